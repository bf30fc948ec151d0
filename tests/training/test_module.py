"""The module inside a real Trainer: what a checkpoint brings with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from clip_train.data.batches import assemble, failed
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.models.text_lengths import TokenIds
from clip_train.training.durations import Clock
from clip_train.training.module import ClipModule, Loss
from tests.checkpoints.states import assert_equal
from tests.models.test_dual_encoder import TINY, random_batch
from tests.training.test_optimizer import EVERY, settings

BATCH_SIZE = 4
OPTIM = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.98], "eps": 1e-6, "grad_clip": 1.0, "warmup": "0 steps"}
BAD_STEPS = (0, 2)


def train(
    precision: str,
    steps: int,
    folder: Path,
    resume: Path | None = None,
    optim: Mapping[str, Any] = OPTIM,
    loss: Loss = contrastive_loss,
    callbacks: Sequence[L.Callback] = (),
    accelerator: str = "cpu",
) -> tuple[ClipModule, Path]:
    """Train up to a step; returns the module and its checkpoint, as Lightning writes it."""
    clock = Clock(BATCH_SIZE, epoch_samples=BATCH_SIZE, total_samples=steps * BATCH_SIZE)
    module = ClipModule(create_dual_encoder(**TINY), loss, optim, clock, seed=0)
    # Asked for by name, Lightning takes bf16 on a processor.
    chosen: dict[str, Any] = (
        {"plugins": [MixedPrecision("16-mixed", "cpu")]} if precision == "16-mixed" else {"precision": precision}
    )
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
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


def test_rates_of_towers_follow_the_schedule(tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            assert isinstance(pl_module, ClipModule)
            groups = trainer.optimizers[0].param_groups
            names = {name: group["lr"] for group in groups for name in group["param_names"]}
            rates.append((pl_module.lr, names["text.projection.weight"], names["vision.projection.weight"]))

    optim = {**OPTIM, "vision": {"lr": 1e-4}}
    _, checkpoint = train("32", 2, tmp_path, optim=optim, callbacks=[Rates()])
    assert rates == [(1e-3, 1e-3, 1e-4), (5e-4, 5e-4, 5e-5)]
    rates.clear()
    train("32", 4, tmp_path, checkpoint, optim={**OPTIM, "lr": 1e-2, "text": {"lr": 2e-3}}, callbacks=[Rates()])
    factor = 0.5  # at half of the four steps
    assert rates[0] == pytest.approx((1e-2 * factor, 2e-3 * factor, 1e-2 * factor))


def test_texts_are_sent_with_their_lengths_where_there_are_any():
    clock = Clock(BATCH_SIZE, epoch_samples=BATCH_SIZE, total_samples=BATCH_SIZE)
    module = ClipModule(create_dual_encoder(**TINY), contrastive_loss, OPTIM, clock, seed=0)
    pixels, ids = random_batch(BATCH_SIZE)
    sent = module.send(assemble(pixels.permute(0, 2, 3, 1), ids.numpy()))["text"]
    assert isinstance(sent, TokenIds) and torch.equal(sent.ids, ids)
    assert module.send(failed("no sample can be used"))["error"] == "no sample can be used"
    module.model.batch_keys = ("features", "label")  # of a linear probe, whose batches have no texts
    features = assemble(pixels.permute(0, 2, 3, 1), np.empty((BATCH_SIZE, 0), dtype=np.int64))
    assert module.send(features)["text"].shape == (BATCH_SIZE, 0)


class Changes(L.Callback):
    """Whether weights or optimizer changed in each step."""

    def __init__(self) -> None:
        self.changed, self.step_counts = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = _state(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        try:
            assert_equal(_state(trainer), self.before)
        except AssertionError:
            self.changed.append(True)
        else:
            self.changed.append(False)
        self.step_counts.append(trainer.global_step)


def _state(trainer: L.Trainer) -> list[Any]:
    """Copies of the weights and of what the optimizer holds; moments of 0 are the same as none."""
    (optimizer,) = trainer.optimizers
    kept: list[Any] = [parameter.detach().clone() for parameter in trainer.lightning_module.parameters()]
    kept += [float(group["step"]) for group in optimizer.param_groups if group.get("step")]
    for values in optimizer.state.values():
        tensors = {key: value.clone() for key, value in values.items() if torch.is_tensor(value)}
        kept.append({key: value for key, value in tensors.items() if value.any()})
    return [value for value in kept if not isinstance(value, dict) or value]


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
@pytest.mark.parametrize("name", EVERY)
def test_a_bad_step_changes_nothing_whatever_the_optimizer(tmp_path, name, precision):
    changes, losses = Changes(), []

    def loss(image, text, **parameters):
        losses.append(contrastive_loss(image, text, **parameters))
        bad = len(losses) - 1 in BAD_STEPS
        return losses[-1] * float("nan") if bad else losses[-1] / 1e4  # fp16's scaler begins at 65536

    module, _ = train(precision, 4, tmp_path, optim=settings(name, warmup=0), loss=loss, callbacks=[changes])
    assert changes.changed == [step not in BAD_STEPS for step in range(4)]
    assert changes.step_counts == [1, 2, 3, 4]
    assert module.samples_seen == 4 * BATCH_SIZE
