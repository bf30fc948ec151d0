"""Linear layers in float8, emulated on a processor."""

from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F

from clip_train.commands.program import config_dir
from clip_train.errors import ConfigError
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.models.float8 import check_float8, use_float8
from clip_train.training import parts
from clip_train.training.durations import Clock
from tests.models.coca import our_coca
from tests.models.test_dual_encoder import TINY, random_batch


def gradients(model: nn.Module) -> tuple[float, torch.Tensor]:
    """The loss of a batch, and all gradients in a row."""
    image, text = model(*random_batch(8))
    loss = contrastive_loss(image, text, model.logit_scale.exp())  # pyright: ignore[reportCallIssue, reportArgumentType]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_linear_layers_of_blocks_and_no_others():
    model = create_dual_encoder(**TINY)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = use_float8(model, emulate=True)
    parts = {name.rpartition("1.")[2] for name in found if ".1." in name}
    layers = {"attn.qkv", "attn.proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"}
    assert parts == layers | {"mlp.fc1", "mlp.fc2"}
    assert len(found) == 2 * (4 + 6)
    converted = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert converted == set(found)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_gradients_are_near_those_of_bf16():
    torch.manual_seed(0)
    model = create_dual_encoder(**TINY)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = gradients(model)
    model.zero_grad()
    use_float8(model, emulate=True)
    found_loss, found = gradients(model)
    assert found_loss == pytest.approx(loss, rel=0.02)
    assert F.cosine_similarity(found, expected, dim=0) > 0.95
    assert found.norm() == pytest.approx(expected.norm().item(), rel=0.05)
    assert not torch.equal(found, expected)


def test_what_is_frozen_or_does_not_divide_or_is_part_of_attention_stays():
    model = create_dual_encoder(**TINY)
    model.vision.requires_grad_(False)
    narrow = model.get_submodule("text.trunk.encoder.layers.0.mlp")
    narrow.fc1 = nn.Linear(64, 24)
    narrow.fc2 = nn.Linear(24, 64)
    found = use_float8(model, emulate=True)
    assert len(found) == 6 + 4 and all(name.startswith("text.") for name in found)
    decoder = [name for name in use_float8(our_coca(), emulate=True) if name.startswith("decoder.")]
    assert decoder and not any("attn" in name for name in decoder)  # it takes the weights of its layers itself


def test_without_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU with products in float8"):
        check_float8()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 .* this one has 8\.0"):
        check_float8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_float8()


def make_module(monkeypatch, learns: bool = True) -> nn.Module:
    """As a run makes it with trainer.float8=true, as if there were a GPU that has it."""
    monkeypatch.setattr(parts, "check_float8", lambda: None)
    monkeypatch.setattr(parts, "use_float8", partial(use_float8, emulate=True))
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", ["experiment=demo", "trainer.float8=true"])
    model = create_dual_encoder(**TINY)
    model.requires_grad_(learns)
    return parts.make_module(cfg, Clock(8, epoch_samples=8, total_samples=80), model)


def test_it_reaches_the_run_which_says_how_many(monkeypatch, caplog):
    with caplog.at_level("INFO"):
        module = make_module(monkeypatch)
    converted = [layer for layer in module.modules() if type(layer).__name__ == "Float8Linear"]
    assert len(converted) == 20
    assert "20 linear layers compute in float8" in caplog.text


def test_a_model_without_such_layers_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="finds no linear layer"):
        make_module(monkeypatch, learns=False)
