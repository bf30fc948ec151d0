"""clip-embed and clip-search in this process, and a small model with random weights for them."""

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from safetensors.torch import save_file

from clip_train.commands import embed
from tests.interop.tiny import CLIP, ours


def call(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
    """Run a program; returns its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), _logging_as_before():
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit:
            main()
    assert isinstance(exit.value.code, int)
    return exit.value.code, out.getvalue(), err.getvalue()


@contextmanager
def _logging_as_before() -> Iterator[None]:
    """A program decides where the package logs to; the next test, or program, in this process shall not find that."""
    logger = logging.getLogger("clip_train")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers = []
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def write_model(folder: Path) -> list[str]:
    """Weights and their config in a folder; returns the arguments that name them."""
    save_file(ours(CLIP).state_dict(), folder / "model.safetensors")
    (folder / "configs" / "model").mkdir(parents=True)
    (folder / "configs" / "model" / "tiny.yaml").write_text(json.dumps(CLIP))
    return ["--config-dir", f"{folder}/configs", f"weights={folder}/model.safetensors", "model=tiny"]


def embed_shard(folder: Path, shard: Path, *more: str) -> None:
    """Write `folder/embeddings`, and the model that they are of."""
    data = [f"data={shard}", "data.num_workers=0", f"data.cache_dir={folder}/indexes", "trainer.accelerator=cpu"]
    code, _, error = call(embed.main, *write_model(folder), *data, f"output={folder}/embeddings", *more)
    assert code == 0, error
