"""Weights rounded before they are gathered give what autocast gives when it rounds them after."""

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from clip_train.checkpoints.folder import list_checkpoints, verify
from clip_train.distributed import gathers_rounded
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.training.fsdp import shard_towers
from scripts.bench.measure import WireBytes
from tests.distributed.test_fsdp import metric
from tests.distributed.train_many import train_on
from tests.models.coca import COCA
from tests.models.test_dual_encoder import TINY
from tests.ranks import pool_group

CONVNET = {**TINY, "quick_gelu": False, "vision": {"name": "resnet18"}}
SIGLIP = {**TINY, "quick_gelu": False, "vision": {**TINY["vision"], "name": "vit_base_patch16_siglip_224"}}
SIGLIP["vision"]["options"] = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
MODELS = {"vit": TINY, "convnet": CONVNET, "siglip": SIGLIP, "coca": COCA}


def step(name: str, rounded: bool) -> tuple[list[torch.Tensor], float]:
    """Loss and whole gradients of two micro-batches, of which the last exchanges, and the bytes that were sent."""
    group = pool_group(2)
    assert group is not None
    torch.manual_seed(0)
    model = create_dual_encoder(**MODELS[name]).train()
    shard_towers(model, DeviceMesh.from_group(group, "cpu"), rounded)
    shards = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
    torch.manual_seed(1 + torch.distributed.get_rank(group))
    losses = []
    with WireBytes() as wire:
        for last in (False, True):
            for shard in shards:
                shard.set_requires_gradient_sync(last, recurse=False)  # pyright: ignore[reportCallIssue]
            pixels, ids = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 49000, (4, 16))
            with torch.autocast("cpu", torch.bfloat16):
                image, text, *captions = model(pixels, ids)
                loss = contrastive_loss(image, text, model.logit_scale.exp(), group=group)
                loss = loss + captions[0].mean() if captions else loss
            loss.backward()
            losses.append(loss.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return losses + [g.full_tensor() if isinstance(g, DTensor) else g for g in grads], wire.sent


@pytest.mark.skipif(not gathers_rounded(), reason="before torch 2.15 all is gathered in fp32")
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_the_same_to_the_bit_and_less_is_sent(pool, name):
    whole, rounded = (pool.run(step, name, rounded, ranks=2) for rounded in (False, True))
    for (expected, sent), (found, less) in zip(whole, rounded, strict=True):
        assert len(found) == len(expected) > 10
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert less < sent


RUN = (
    "batch_size=16 max_steps=6 optim.warmup=0 optim.lr=1e-3 trainer.precision=bf16-mixed micro_batch_size=4"
    " data.val.shards=demo:emoji/val_concept/*.tar eval.batch_size=64 eval.every=6 eval.picture=false ema.decay=0.5"
    " checkpoint.every=3 checkpoint.keep=2"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders of two ranks in bf16."""
    folder = tmp_path_factory.mktemp("runs")
    fsdp = f"{RUN} trainer.strategy=fsdp"
    half = folder / "offloaded" / "checkpoints" / "samples_00000000000048.ckpt"
    train_on(
        2,
        folder,
        f"ddp {RUN} trainer.strategy=ddp",
        f"fsdp {fsdp}",
        f"offloaded {fsdp} trainer.fsdp.cpu_offload=true",
        f"resumed {fsdp} trainer.fsdp.cpu_offload=true resume={half}",
    )
    return folder


def test_a_run_in_bf16_has_the_losses_of_ddp(runs):
    for column in ("train/loss", "train/grad_norm", "val/val_concept/loss"):
        ddp, fsdp = (metric(runs / strategy, column) for strategy in ("ddp", "fsdp"))
        assert len(ddp) == (1 if "val" in column else 6)
        assert fsdp == pytest.approx(ddp, rel=0.01)


def test_a_run_with_its_shards_in_host_memory_is_the_same(runs):
    """On a processor they are there already: all but the transfers is tried."""
    ends = [
        verify(list_checkpoints(runs / name / "checkpoints")[-1]).files for name in ("fsdp", "offloaded", "resumed")
    ]
    tensors = [{name: file for name, file in end.items() if name.endswith(".safetensors")} for end in ends]
    assert len(tensors[0]) == 6
    assert tensors[0] == tensors[1] == tensors[2]
