"""Ranks that find different checkpoints when a run begins."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clip_train.checkpoints.folder import checkpoint_name, list_checkpoints
from clip_train.distributed import group_rank
from clip_train.training import run_start
from clip_train.training.run_folder import RunFolder
from clip_train.training.run_start import RunStart
from tests.ranks import RankPool

OLD, NEW = checkpoint_name(32), checkpoint_name(64)


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


def begin(folder: Path, is_restarted: bool, looked_again: bool, lists_until_seen: int) -> str:
    """What a rank leaves by, if the second one sees the newest checkpoint only when it lists them for so many times."""
    listed = []

    def list_late(path: Path) -> list[Path]:
        listed.append(path)
        late = group_rank() == 1 and len(listed) < lists_until_seen
        return [found for found in list_checkpoints(path) if not (late and found.name == NEW)]

    run_start.list_checkpoints, run_start._LISTING_SECONDS = list_late, 3.0
    os.environ["CLIP_TRAIN_RESTARTED"] = str(int(is_restarted))
    run = RunFolder(folder)
    rank_log: Any = SimpleNamespace(open=lambda path: None)
    settings = {"config": {}, "config_text": "", "resume": "auto", "data_fingerprint": "", "announce": lambda: None}
    checkpoint = run.checkpoints / (OLD if group_rank() == 1 else NEW)
    start = RunStart(run, rank_log, checkpoint=checkpoint, looked_again=looked_again, **settings)
    trainer: Any = SimpleNamespace(is_global_zero=group_rank() == 0, global_rank=group_rank())
    module: Any = None
    try:
        start.setup(trainer, module, "fit")
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return ""


@pytest.mark.parametrize(
    ("is_restarted", "looked_again", "lists_until_seen", "expected"),
    [
        (True, False, 1, "LookAgain "),
        (True, False, 2, "LookAgain "),
        (True, False, 1000, "FaultError the ranks find different checkpoints ("),
        (True, True, 1, "FaultError the ranks find different checkpoints ("),
        (False, False, 1, "DataError the ranks find different checkpoints ("),
    ],
)
def test_only_a_run_started_again_is_patient(pool, tmp_path, is_restarted, looked_again, lists_until_seen, expected):
    for name in (OLD, NEW):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    here, there = pool.run(begin, tmp_path, is_restarted, looked_again, lists_until_seen)
    assert here == there and here.startswith(expected)
    assert (OLD in here and NEW in here) == (expected != "LookAgain ")
    assert not (tmp_path / "config.yaml").exists()
