"""Parts of a step that only a GPU has: copies on a stream of their own, no waiting, shards in host memory, float8.

Compiled blocks are in tests/models/test_compiling.py.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from clip_train.errors import ConfigError
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder, text_lengths
from clip_train.models.float8 import check_float8, use_float8
from clip_train.training.copied_ahead import CopiedAhead
from clip_train.training.fsdp import shard_towers
from clip_train.training.optim.bad_step import clip_or_skip, telling_seed
from tests.models.test_dual_encoder import TINY, random_batch
from tests.ranks import run_on_ranks
from tests.training import test_module
from tests.training.test_host_sync import Strict
from tests.training.test_module import train
from tests.training.test_step_times import train_metrics

GPU = "cuda"
NUMBERS = 1 << 22
pytestmark = pytest.mark.gpu


def keep_busy() -> None:
    """The device computes for a while; the host goes on."""
    torch.cuda._sleep(50_000_000)  # cycles


def test_gpu_batches_arrive_whole_though_their_memory_is_used_again():
    """Read late, each by a step that the device is behind with, while those to come are copied."""
    device = torch.device(GPU)
    batches: Any = [{"image": torch.full((NUMBERS,), n, dtype=torch.uint8).pin_memory()} for n in range(1, 9)]
    ahead = iter(CopiedAhead(batches, lambda batch: _sent(batch, device), device))
    sums, addresses = [], []
    present = next(ahead, None)
    while present is not None:
        following = next(ahead, None)  # a step ahead, as Lightning fetches
        image = present.arrived()["image"]
        keep_busy()
        sums.append(image.sum(dtype=torch.int64))
        addresses.append(image.data_ptr())
        del image
        present = following
    assert [total.item() for total in sums] == [n * NUMBERS for n in range(1, 9)]
    assert len(set(addresses)) < len(addresses)  # or there would be nothing to go wrong


def _sent(batch: Any, device: torch.device) -> Any:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_gpu_is_not_waited_for_with_texts_in_groups(tmp_path, monkeypatch, micro_batch_size):
    monkeypatch.setattr(text_lengths, "CALL_COST", 0)
    monkeypatch.setattr(test_module, "BATCH_SIZE", 8)
    monkeypatch.setitem(TINY["text"], "length_multiple", 5)
    groups, of_lengths = [], text_lengths._groups
    monkeypatch.setattr(text_lengths, "_groups", lambda *args: groups.append(of_lengths(*args)) or groups[-1])
    strict = Strict(micro_batch_size)
    try:
        train("32", 5, tmp_path, callbacks=[train_metrics(log_every=100), strict], accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.steps == 3  # without an error
    assert max(map(len, groups)) == 2


def test_gpu_steps_with_shards_in_host_memory_are_those_without():
    (plain,), (offloaded,) = (run_on_ranks(sharded_steps, 1, GPU, offload) for offload in (False, True))
    assert plain["devices"] == ["cuda"] and offloaded["devices"] == ["cpu"]
    assert plain["losses"][0] > plain["losses"][-1]
    for name in ("losses", "norms"):
        assert offloaded[name] == pytest.approx(plain[name], rel=1e-4)
    # The second step's gradient is not finite, and changes nothing.
    assert plain["changed"] == offloaded["changed"] == [True, False, True]


def sharded_steps(device: str, offload: bool) -> dict[str, list[Any]]:
    """Three steps of one rank: losses, norms of the gradient, whether weights changed, and where the shards lie."""
    group: Any = dist.new_group(backend="nccl" if device == GPU else "gloo")
    torch.manual_seed(0)
    model = create_dual_encoder(**TINY).to(device)
    shard_towers(model, DeviceMesh.from_group(group, device), offload=offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    pixels, ids = random_batch(8)
    found: dict[str, list[Any]] = {"losses": [], "norms": [], "changed": [], "devices": []}
    for bad in (False, True, False):
        image, text = model(pixels.to(device), ids)
        loss = contrastive_loss(image, text, model.logit_scale.exp())
        seen = loss * float("nan") if bad else loss
        seen.backward(gradient=telling_seed(seen))
        before = [weight.clone() for weight in _shards(model)]
        norm = clip_or_skip(optimizer, model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        found["norms"] += [] if bad else [norm.item()]
        found["changed"].append(any(not torch.equal(*pair) for pair in zip(before, _shards(model), strict=True)))
    found["devices"] = sorted({weight.device.type for weight in _shards(model)})
    return found


def _shards(model: torch.nn.Module) -> list[Tensor]:
    return [weight.to_local().detach() for weight in model.parameters() if isinstance(weight, DTensor)]


def test_gpu_gradients_in_float8_are_near_those_of_bf16():
    try:
        check_float8()
    except ConfigError as error:
        pytest.skip(str(error))
    found = []
    for float8 in (False, True):
        torch.manual_seed(0)
        model = create_dual_encoder(**TINY).to(GPU)
        assert not float8 or len(use_float8(model)) == 20
        pixels, ids = random_batch(8)
        with torch.autocast(GPU, torch.bfloat16):
            image, text = model(pixels.to(GPU), ids)
            loss = contrastive_loss(image, text, model.logit_scale.exp())
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, expected), (loss8, gradient) = found
    assert loss8 == pytest.approx(loss, rel=0.02)
    assert F.cosine_similarity(gradient, expected, dim=0) > 0.95
    assert not torch.equal(gradient, expected)
