"""Ways to fine-tune: what they freeze, what they add, and what that costs."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from clip_train.errors import ConfigError
from clip_train.losses import contrastive_loss
from clip_train.models.adaptation import METHODS, adapt
from clip_train.models.locking import fixed_names
from clip_train.models.lora import merge_lora
from tests.models.adapted import ADAPTER, DORA, FAMILIES, LIT, LORA, batch_for, build


def learned(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model, family: str) -> None:
    model.train()
    outputs = model(*batch_for(model, family))
    torch.stack(
        [(output * torch.randn_like(output)).sum() for output in outputs if output.requires_grad]
    ).sum().backward()


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lora_begins_as_the_base_learns_everywhere_and_merges(family, settings):
    model = build(family)
    names, batch = set(model.state_dict()), batch_for(model, family)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model.eval()(*batch)
    model = adapt(model, settings)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*batch), before, rtol=0, atol=1e-6)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    backward(model, family)
    assert learned(model) and all("lora_" in name for name in learned(model))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learned(model)
    for name, tensor in model.state_dict().items():  # running statistics too
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer.", ".")]), name

    with torch.no_grad():
        unmerged = model.eval()(*batch)
        merge_lora(model)
        merged = model(*batch)
    assert set(model.state_dict()) == names
    for x, y, z in zip(unmerged, merged, before, strict=True):
        assert (x - y).abs().max() < 1e-5
        assert (y - z).abs().max() > 1e-3


def test_lora_where_it_is_told_to():
    settings = {**LORA, "towers": ["text"], "target_modules": {"image": None, "text": ["q_proj", "v_proj"]}}
    names = learned(adapt(build("clip"), settings))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    assert all(name.startswith("text.trunk.") for name in names) and len(names) == 2 * 2 * 2
    settings = {**LORA, "train_logit_scale": True}
    assert {name for name in learned(adapt(build("siglip"), settings)) if "lora" not in name} == {
        "logit_scale",
        "logit_bias",
    }


def test_a_clip_adapter_mixes_features():
    model = build("clip")
    batch = batch_for(model, "clip")
    features = model.vision(model.image_mean.new_zeros(2, 3, 32, 32))
    adapted = adapt(model, ADAPTER)
    assert learned(adapted) == {
        f"{side}_adapter.{part}.weight" for side in ("image", "text") for part in ("down", "up")
    }
    down, up = model.image_adapter.down.weight, model.image_adapter.up.weight  # pyright: ignore
    assert down.shape == (8, 32)
    new = ((features @ down.T).relu() @ up.T).relu()
    torch.testing.assert_close(model.image_adapter(features), 0.2 * new + 0.8 * features)
    backward(adapted, "clip")
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert all(output.requires_grad for output in adapted(*batch))


def test_lit_locks_a_tower_but_for_its_last_groups():
    blocks = {
        0: set(),
        1: {"norm", "projection"},
        2: {"norm", "projection", "blocks.1"},
        3: {"norm", "projection", "blocks.1", "blocks.0"},
    }
    for groups, parts in blocks.items():
        names = learned(adapt(build("clip"), {**LIT, "unlocked_groups": groups}))
        found = {
            name.removeprefix("vision.").removeprefix("trunk.").split(".")[0]
            if "blocks" not in name
            else ".".join(name.removeprefix("vision.trunk.").split(".")[:2])
            for name in names
            if name.startswith("vision.")
        }
        assert found == parts
        assert {name for name in names if name.startswith("text.")} == {
            f"text.{name}" for name, _ in build("clip").text.named_parameters()
        }
        assert "logit_scale" in names
    names = learned(adapt(build("clip"), {**LIT, "lock": "text", "unlocked_groups": 1}))
    assert {name for name in names if name.startswith("text.")} == {
        "text.trunk.final_layer_norm.weight",
        "text.trunk.final_layer_norm.bias",
        "text.projection.weight",
    }


@pytest.mark.parametrize("freeze_bn_stats", [True, False])
def test_statistics_of_a_locked_resnet(freeze_bn_stats):
    model = adapt(build("resnet"), {**LIT, "freeze_bn_stats": freeze_bn_stats})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    assert not any(part.training for part in model.modules())
    model.train()
    assert model.text.training and not model.vision.trunk.get_submodule("stages.0").training
    model(*batch_for(model, "resnet"))
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert changed == (set() if freeze_bn_stats else statistics)
    assert bool(statistics & fixed_names(model)) == freeze_bn_stats


class Kept:
    """A tensor in autograd's keeping."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(model, family: str) -> int:
    """What autograd keeps from a training step's forward for its backward, but for parameters."""
    parameters = {p.data_ptr() for p in model.parameters()}
    notes: list[weakref.ref[Kept]] = []

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        notes.append(weakref.ref(kept))
        return kept

    model.train()
    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = contrastive_loss(*model(*batch_for(model, family, 8)), **model.logit_parameters())
    assert loss.requires_grad
    alive = {kept.tensor.data_ptr(): kept.tensor for kept in (note() for note in notes) if kept is not None}
    return sum(t.numel() * t.element_size() for address, t in alive.items() if address not in parameters)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("family", ["clip", "resnet", "bert"])
def test_a_frozen_tower_keeps_no_activations(family, grad_checkpointing):
    model = build(family, grad_checkpointing=grad_checkpointing)
    adapt(model, ADAPTER)
    pixels, ids = batch_for(model, family)
    assert not model.train().vision((pixels - model.image_mean) / model.image_std).requires_grad
    assert not model.text(ids).requires_grad
    few, whole = kept_bytes(model, family), kept_bytes(build(family), family)
    assert few < 100 * 8 * model.embed_dim  # the features, some times over
    assert whole > 10 * few
    assert few < kept_bytes(adapt(build(family), LIT), family) < whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "finetune.method=magic is none of full, lit, lora, adapter"),
        ({**LIT, "lock": "both"}, "finetune.lock=both is none of image, text"),
        ({**LORA, "towers": ["images"]}, "finetune.towers=images is none of image, text"),
        ({**LORA, "towers": []}, "finetune.towers=[]: give image, text or both"),
        ({**LORA, "rank": 0}, "finetune: peft refuses {'r': 0"),
        ({**LORA, "target_modules": {"image": ["nothing"], "text": None}}, "finetune: peft refuses"),
        ({**ADAPTER, "ratio": 1.5}, "finetune.ratio=1.5 is a share"),
        ({**ADAPTER, "reduction": 64}, "finetune.reduction=64: give at least 1 and at most model.embed_dim=32"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(ConfigError) as error:
        adapt(build("clip"), settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"finetune=lora needs peft: pip install '\.\[finetune\]' in the checkout"):
        adapt(build("clip"), LORA)


def test_methods_that_freeze_the_base_save_what_they_add():
    assert {name for name, method in METHODS.items() if method.adapter_only} >= {"lora", "adapter"}
    model = adapt(build("resnet"), ADAPTER)
    assert set(model.state_dict()) - fixed_names(model) == learned(model)
