"""The module inside a real Trainer: what a checkpoint brings with it."""

from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.training.durations import Clock
from clip_train.training.module import ClipModule
from tests.models.test_dual_encoder import TINY, random_batch

BATCH_SIZE = 4
OPTIM = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-6, "grad_clip": 1.0, "warmup": "0 steps"}


def train(precision: str, steps: int, folder: Path, resume: Path | None = None) -> tuple[ClipModule, Path]:
    """Train up to a step, on the processor; returns the module and its checkpoint, as Lightning writes it."""
    clock = Clock(BATCH_SIZE, epoch_samples=BATCH_SIZE, total_samples=steps * BATCH_SIZE)
    module = ClipModule(create_dual_encoder(**TINY), contrastive_loss, OPTIM, clock, seed=0)
    # Asked for by name, Lightning takes bf16 on a processor.
    chosen: dict[str, Any] = (
        {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **chosen,
    )
    pixels, ids = random_batch(BATCH_SIZE)
    batch = {"image": pixels, "text": ids, "seconds": {}}
    loader = DataLoader(cast(Any, [batch]), batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    assert trainer.precision == ("16-mixed" if precision == "16-mixed" else "32-true")
    path = folder / f"{precision}_{steps}.ckpt"
    trainer.save_checkpoint(path)
    return module, path


@pytest.mark.parametrize(("before", "after"), [("16-mixed", "32"), ("32", "16-mixed")])
def test_a_run_goes_on_in_another_precision(tmp_path, before, after):
    first, checkpoint = train(before, 2, tmp_path)
    module, _ = train(after, 4, tmp_path, checkpoint)
    assert module.samples_seen == 4 * BATCH_SIZE
    optimizer = module.trainer.optimizers[0]
    assert all(group["fused"] == (after == "32") for group in optimizer.param_groups)
    assert any(not torch.equal(old, new) for old, new in zip(first.parameters(), module.parameters(), strict=True))
    assert torch.as_tensor(module.step_metrics["train/grad_norm"]).isfinite()
