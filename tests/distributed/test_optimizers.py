"""An optimizer on shards does to a weight what it does on whole tensors; so does the average of the weights."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from clip_train.checkpoints.folder import list_checkpoints, read_ema_weights, read_weights, verify
from clip_train.models import create_dual_encoder
from clip_train.training.fsdp import shard_towers
from clip_train.training.optim.bad_step import clip_or_skip
from clip_train.training.optim.optimizer import OPTIMIZERS, build_optimizer, set_rates
from tests.distributed.test_fsdp import metric
from tests.distributed.train_many import train_on
from tests.models.test_dual_encoder import TINY, random_batch
from tests.ranks import pool_group
from tests.training.test_optimizer import settings

CAN_SHARD = sorted(name for name, kind in OPTIMIZERS.items() if kind.can_shard)


def trained_weights(name: str, sharded: bool, **options: Any) -> dict[str, torch.Tensor]:
    """The whole weights after three steps, all ranks with the same pairs."""
    torch.manual_seed(0)
    model = create_dual_encoder(**TINY)
    if sharded:
        group = pool_group(2)
        assert group is not None
        shard_towers(model, DeviceMesh.from_group(group, "cpu"))
    optimizer = build_optimizer(model, settings(name, vision={"layer_decay": 0.5}, **options), fused=True)
    for step in range(3):
        torch.manual_seed(step)
        set_rates(optimizer, 10 / (1 + step))
        image, text = model(*random_batch(4))
        (image * text).sum().mul(model.logit_scale).backward()
        clip_or_skip(optimizer, model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in model.named_parameters()}
    return {name: weight.detach() for name, weight in whole.items()}


@pytest.mark.parametrize("name", CAN_SHARD)
def test_on_shards(pool, name):
    found = pool.run(trained_weights, name, True, ranks=2)
    assert others_than(trained_weights(name, sharded=False), found, 1e-3) == []


def test_a_state_in_bf16_on_shards(pool):
    """Other noise rounds it than on whole tensors."""
    found = pool.run(partial(trained_weights, state="bf16"), "adamw", True, ranks=2)
    assert others_than(trained_weights("adamw", sharded=False), found, 2e-2) == []


def others_than(expected: dict[str, torch.Tensor], runs: list[dict[str, torch.Tensor]], accuracy: float) -> list[str]:
    """The weights that ended elsewhere in some run, further than this share of the way that they went."""
    torch.manual_seed(0)
    begin = dict(create_dual_encoder(**TINY).named_parameters())
    return [
        parameter
        for found in runs
        for parameter, weight in expected.items()
        if not parameter.endswith("k_proj.bias")  # attention does not depend on it: its gradient is rounding
        and not (found[parameter] - weight).norm() <= accuracy * (weight - begin[parameter]).norm() + 1e-6
    ]


RUN = (
    "batch_size=32 max_steps=4 checkpoint.every=2 checkpoint.keep=2 optim.warmup=0 ema.decay=0.5"
    " data.val.shards=demo:emoji/val_concept/*.tar eval.batch_size=64 eval.every=null eval.picture=false"
)


def test_the_average_in_shards_is_that_of_one_process_and_survives_a_resume(tmp_path):
    train_on(1, tmp_path, f"one {RUN}")
    half = tmp_path / "sharded" / "checkpoints" / "samples_00000000000064.ckpt"
    sharded = f"{RUN} trainer.strategy=fsdp"
    train_on(2, tmp_path, f"sharded {sharded}", f"resumed {sharded} resume={half}")
    one, found, resumed = (
        list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("one", "sharded", "resumed")
    )
    averages, weights = read_ema_weights(one), read_weights(one)
    for name, average in read_ema_weights(found).items():
        assert (average - averages[name]).norm() <= 1e-5 * (averages[name].norm() + 1), name
    name = "model.vision.projection.weight"
    assert (averages[name] - weights[name]).norm() > 1e-4 * weights[name].norm()
    column = "val/val_concept/loss"
    assert metric(tmp_path / "sharded", column) == pytest.approx(metric(tmp_path / "one", column), rel=1e-3)
    files = [
        {name: record for name, record in verify(path).files.items() if "ema" in name} for path in (found, resumed)
    ]
    assert sorted(files[0]) == ["ema.00000.safetensors", "ema.00001.safetensors"]
    assert files[0] == files[1]
