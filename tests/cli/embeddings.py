"""Embeddings by a small model with random weights, to be searched."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from clip_train.commands import embed
from tests.interop.tiny import CLIP, ours


def embed_shard(folder: Path, shard: Path, *more: str) -> None:
    """Write `folder/embeddings`, and the model that they are of."""
    save_file(ours(CLIP).state_dict(), folder / "model.safetensors")
    (folder / "configs" / "model").mkdir(parents=True)
    (folder / "configs" / "model" / "tiny.yaml").write_text(json.dumps(CLIP))
    weights = ["--config-dir", f"{folder}/configs", f"weights={folder}/model.safetensors", "model=tiny"]
    data = [f"data={shard}", "data.num_workers=0", f"data.cache_dir={folder}/indexes", "trainer.accelerator=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clip-embed", *weights, *data, f"output={folder}/embeddings", *more])
        with pytest.raises(SystemExit) as exit:
            embed.main()
    assert exit.value.code == 0
