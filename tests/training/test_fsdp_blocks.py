"""What trainer.strategy=fsdp shards by: the blocks of every kind of tower."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from clip_train.distributed import gathers_rounded
from clip_train.models import create_dual_encoder
from clip_train.planning.states import sharded_units
from clip_train.training import fsdp
from clip_train.training.fsdp import repeated_blocks
from clip_train.training.strategy import make_strategy
from tests.models.configs import load_config
from tests.models.test_dual_encoder import TINY


@pytest.mark.parametrize(
    ("config", "vision", "text"),
    [
        ("vit_b_32", {"Block": 12}, {"CLIPEncoderLayer": 12}),
        ("rn50", {"BottleneckBlock": 3 + 4 + 6 + 3, "Sequential": 4}, {"CLIPEncoderLayer": 12}),
        ("vit_b_16_siglip", {"Block": 12}, {"SiglipEncoderLayer": 12}),
        ("eva02_b_16", {"EvaBlock": 12}, {"CLIPEncoderLayer": 12}),
        ("convnext_base", {"ConvNeXtBlock": 3 + 3 + 27 + 3, "ConvNeXtStage": 4}, {"CLIPEncoderLayer": 12}),
        ("align_base", {"InvertedResidual": 51, "DepthwiseSeparableConv": 4, "Sequential": 7}, {"BertLayer": 12}),
        ("dinov2_b_14", {"Block": 12}, {"CLIPEncoderLayer": 12}),
    ],
)
def test_the_blocks_of_each_family(config, vision, text):
    with torch.device("meta"):
        model = create_dual_encoder(**load_config(config))
    assert kinds(model.vision) == vision
    assert kinds(model.text) == text


def test_the_blocks_of_a_decoder():
    with torch.device("meta"):
        model = create_dual_encoder(**load_config("coca_vit_b_32"))
    assert kinds(model.vision) == {"Block": 12}
    assert kinds(model.text) == {"CLIPEncoderLayer": 12}
    assert kinds(model.get_submodule("decoder")) == {"Block": 24}


def kinds(tower: nn.Module) -> dict[str, int]:
    """How many blocks of each kind; each once, inner ones first, and all but a little of the weights in them."""
    blocks = repeated_blocks(tower)
    assert len({id(block) for block in blocks}) == len(blocks)
    for number, block in enumerate(blocks):
        assert not any(later in set(block.modules()) for later in blocks[number + 1 :])
    covered = {id(p) for block in blocks for p in block.parameters()}
    rest = [name for name, p in tower.named_parameters() if id(p) not in covered]
    assert not [name for name in rest if ".blocks." in name or ".layer" in name or ".stages." in name]
    names = [type(block).__name__ for block in blocks]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_offloaded_shards_lie_in_memory_that_a_gpu_can_read(monkeypatch, device, pinned):
    policies = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: policies.append(how["offload_policy"]))
    with torch.device("meta"):
        model = create_dual_encoder(**TINY)
    mesh: Any = SimpleNamespace(device_type=device)
    fsdp.shard_towers(model, mesh, offload=True)
    assert len(policies) == 2 + 2 + 2  # blocks and towers
    assert all(policy == CPUOffloadPolicy(pin_memory=pinned) for policy in policies)
    policies.clear()
    fsdp.shard_towers(model, mesh)
    assert policies and not any(isinstance(policy, CPUOffloadPolicy) for policy in policies)


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_what_the_config_says_reaches_the_shards(monkeypatch, offload, precision):
    said = {"strategy": "fsdp", "fsdp": {"cpu_offload": offload}}
    guard = {"timeout": None, "first_step_timeout": "1h"}
    with torch.device("meta"):
        model = create_dual_encoder(**TINY)
    cfg = OmegaConf.create({"trainer": said, "guard": guard})
    strategy = make_strategy(cfg, SimpleNamespace(size=2), model)  # pyright: ignore[reportArgumentType]
    assert isinstance(strategy, fsdp.ShardedStrategy)
    strategy._lightning_module = SimpleNamespace(model=model)  # pyright: ignore
    strategy.precision_plugin = SimpleNamespace(precision=precision)  # pyright: ignore
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = LightningEnvironment()
    calls = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: calls.append(how))
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda *shape: SimpleNamespace(device_type="cpu"))
    strategy.configure_ddp()
    assert len(calls) == 2 + 2 + 2
    assert all(isinstance(how["offload_policy"], CPUOffloadPolicy) == offload for how in calls)
    dtype = torch.bfloat16 if precision == "bf16-mixed" and gathers_rounded() else None
    assert all(how["mp_policy"].param_dtype == dtype for how in calls)


def test_before_torch_2_15_all_is_gathered_in_fp32_and_planned_so(monkeypatch):
    with torch.device("meta"):
        model = create_dual_encoder(**TINY)
    fields = dict(MixedPrecisionPolicy.__dataclass_fields__)
    fields.pop("param_dtype_override_fn", None)
    monkeypatch.setattr(MixedPrecisionPolicy, "__dataclass_fields__", fields)
    policies = []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: policies.append(how["mp_policy"]))
    fsdp.shard_towers(model, SimpleNamespace(device_type="cpu"), rounded=True)  # pyright: ignore[reportArgumentType]
    assert policies and all(policy.param_dtype is None for policy in policies)
    assert {size for unit in sharded_units(model, "bf16-mixed") for size in unit.sizes} == {4}
