from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from clip_train.checkpoints.folder import read_checkpoint
from clip_train.commands.program import config_dir
from clip_train.errors import ConfigError
from clip_train.models import create_dual_encoder
from clip_train.models.layers import hidden_matrices
from clip_train.training.optim.optimizer import OPTIMIZERS, build_optimizer, set_rates, with_settings_of
from tests.checkpoints.states import assert_equal, state_of
from tests.checkpoints.test_folder import save
from tests.models.coca import our_coca
from tests.models.test_dual_encoder import TINY, random_batch

ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.2, "betas": [0.9, 0.98], "eps": 1e-6}
EVERY = sorted(OPTIMIZERS)


def settings(name: str, **changed: Any) -> dict[str, Any]:
    """The group file of an optimizer."""
    group: Any = OmegaConf.to_container(OmegaConf.load(Path(config_dir()) / "optim" / f"{name}.yaml"))
    return {**group, **changed}


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    """A setting of each parameter's group."""
    values = {id(p): group.get(key) for group in optimizer.param_groups for p in group["params"]}
    return {name: values[id(parameter)] for name, parameter in model.named_parameters()}


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        set_rates(optimizer, 1 / (1 + step))
        image, text = model(*random_batch(4))
        (image * text).sum().mul(model.logit_scale).backward()  # pyright: ignore[reportCallIssue, reportArgumentType]
        optimizer.step()
        optimizer.zero_grad()


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_dual_encoder(**TINY)


def test_every_group_file_makes_its_optimizer():
    files = {path.stem for path in (Path(config_dir()) / "optim").glob("*.yaml")}
    assert files == set(EVERY)
    for name in EVERY:
        assert settings(name)["name"] == name
        build_optimizer(make_model(), settings(name), fused=True)


@pytest.mark.parametrize("name", EVERY)
def test_decay_on_matrices_only(name):
    model = make_model()
    optimizer = build_optimizer(model, settings(name, weight_decay=0.2), fused=True)
    decay = by_name(model, optimizer, "weight_decay")
    assert decay["logit_scale"] == decay["vision.trunk.cls_token"] == 0
    assert decay["vision.trunk.pos_embed"] == decay["text.trunk.embeddings.token_embedding.weight"] == 0.2
    for parameter, value in decay.items():
        if parameter.endswith("bias") or "norm" in parameter:
            assert value == 0, parameter
        elif parameter.endswith("weight"):
            assert value == 0.2, parameter


def test_frozen_parameters_are_left_out():
    model = create_dual_encoder(**TINY)
    model.vision.requires_grad_(False)
    optimizer = build_optimizer(model, ADAMW, fused=False)
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert chosen == {id(p) for p in [*model.text.parameters(), model.logit_scale]}


def test_towers_have_their_own_rate_and_decay():
    model = make_model()
    towers = {"vision": {"lr": 4e-4, "weight_decay": None}, "text": {"lr": None, "weight_decay": 0.05}}
    optimizer = build_optimizer(model, ADAMW | towers, fused=True)
    set_rates(optimizer, 0.5)
    rate, decay = by_name(model, optimizer, "lr"), by_name(model, optimizer, "weight_decay")
    assert {rate[name] for name in rate if name.startswith("vision")} == {2e-4}
    assert {rate[name] for name in rate if not name.startswith("vision")} == {5e-4}
    assert (decay["vision.projection.weight"], decay["text.projection.weight"], decay["logit_scale"]) == (0.2, 0.05, 0)


def test_layer_decay():
    model = make_model()  # two layers in each tower
    optimizer = build_optimizer(model, ADAMW | {"text": {"layer_decay": 0.5}}, fused=True)
    rate = by_name(model, optimizer, "lr")
    assert rate["text.projection.weight"] == rate["text.trunk.final_layer_norm.bias"] == 1e-3
    assert (
        rate["text.trunk.encoder.layers.1.mlp.fc1.weight"] == rate["text.trunk.encoder.layers.1.mlp.fc1.bias"] == 5e-4
    )
    assert rate["text.trunk.encoder.layers.0.layer_norm1.weight"] == 2.5e-4
    assert rate["text.trunk.embeddings.position_embedding.weight"] == 1.25e-4
    assert {rate[name] for name in rate if not name.startswith("text")} == {1e-3}


def test_a_decoder_learns_at_the_rate_of_the_run_and_its_matrices_by_muon():
    model = our_coca()  # two layers in each tower
    towers = {"vision": {"layer_decay": 0.5}, "text": {"lr": 4e-4, "layer_decay": 0.5}}
    rate = by_name(model, build_optimizer(model, ADAMW | towers, fused=True), "lr")
    assert {rate[name] for name in rate if name.startswith("decoder")} == {1e-3}
    assert rate["vision.pooler.query"] == rate["vision.norm.bias"] == rate["vision.projection.weight"] == 1e-3
    assert (rate["vision.trunk.blocks.1.mlp.fc1.weight"], rate["text.cls_emb"]) == (5e-4, 5e-5)
    fallback = by_name(model, build_optimizer(model, settings("muon"), fused=True), "use_fallback")
    for row in ("self_blocks", "cross_blocks"):
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.fc1.weight"):
            assert not fallback[f"decoder.{row}.1.{name}"]
    assert fallback["decoder.head.weight"] and fallback["vision.pooler.query"] and fallback["decoder.norm.weight"]


def test_muon_is_for_hidden_matrices_and_adamw_for_the_rest():
    model, reference = make_model(), make_model()
    optim = settings("muon", ns_coefficients="original")
    take_steps(model, build_optimizer(model, optim, fused=True), range(1))
    hidden = {*hidden_matrices(reference.get_submodule("vision")), *hidden_matrices(reference.get_submodule("text"))}
    rest = [parameter for parameter in reference.parameters() if parameter not in hidden]
    decayed = [parameter for parameter in rest if parameter.squeeze().ndim > 1]
    groups = [{"params": decayed}, {"params": list(set(rest) - set(decayed)), "weight_decay": 0.0}]
    common = {"lr": optim["lr"], "weight_decay": optim["weight_decay"]}
    torch.manual_seed(0)
    image, text = reference(*random_batch(4))
    (image * text).sum().mul(reference.logit_scale).backward()  # pyright: ignore[reportCallIssue, reportArgumentType]
    torch.optim.AdamW(groups, **common, betas=(0.9, 0.98), eps=1e-6).step()
    torch.optim.Muon(list(hidden), **common, adjust_lr_fn="match_rms_adamw").step()
    rows = zip(model.named_parameters(), reference.parameters(), make_model().parameters(), strict=True)
    for (name, found), expected, before in rows:
        accuracy = 0.05 if expected in hidden else 1e-3  # Muon multiplies in bf16
        assert (found - expected).norm() <= accuracy * (expected - before).norm(), name


@pytest.mark.parametrize("name", EVERY)
def test_four_steps_are_two_and_a_checkpoint_and_two(name, tmp_path):
    whole, first, second = make_model(), make_model(), make_model(seed=1)
    optimizer, halves = build_optimizer(whole, settings(name), fused=True), []
    take_steps(whole, optimizer, range(4))
    halves.append(build_optimizer(first, settings(name), fused=True))
    take_steps(first, halves[0], range(2))
    state = read_checkpoint(save(tmp_path / "half.ckpt", state_of(first, halves[0])))
    second.load_state_dict(state["state_dict"])
    halves.append(build_optimizer(second, settings(name), fused=True))
    halves[1].load_state_dict(with_settings_of(halves[1], state["optimizer_states"][0], second))
    take_steps(second, halves[1], range(2, 4))
    assert_equal(second.state_dict(), whole.state_dict())
    assert_equal(halves[1].state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", EVERY)
def test_a_state_goes_on_under_other_settings(name):
    model = make_model()
    optimizer = build_optimizer(model, settings(name), fused=True)
    take_steps(model, optimizer, range(2))
    changed = settings(name, lr=0.5, weight_decay=0.7, vision={"layer_decay": 0.5}, text={"lr": 0.1})
    other = build_optimizer(model, changed, fused=True)
    assert len(other.param_groups) > len(optimizer.param_groups)
    expected = {name: [dict(group)[name] for group in other.param_groups] for name in ("initial_lr", "weight_decay")}
    other.load_state_dict(with_settings_of(other, optimizer.state_dict(), model))
    for parameter in model.parameters():
        assert_equal(other.state[parameter], optimizer.state[parameter])
    for key, values in expected.items():
        assert [group[key] for group in other.param_groups] == values
    assert {float(g.get("step", 0)) for g in other.param_groups} == {2.0 if name == "lamb" else 0.0}


def test_a_state_from_before_names_were_saved():
    model = make_model()
    optimizer = build_optimizer(model, ADAMW, fused=True)
    take_steps(model, optimizer, range(1))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["param_names"], group["initial_lr"]
    other = build_optimizer(model, ADAMW | {"vision": {"layer_decay": 0.5}}, fused=True)
    other.load_state_dict(with_settings_of(other, state, model))
    for parameter in model.parameters():
        assert_equal(other.state[parameter], optimizer.state[parameter])


def test_settings_that_the_class_refuses():
    with pytest.raises(ConfigError, match=r"optim=adamw: Invalid beta parameter at index 0: 2"):
        build_optimizer(make_model(), ADAMW | {"betas": [2, 0.9]}, fused=False)
    with pytest.raises(ConfigError, match=r"optim=lion: .*unexpected keyword argument 'eps'"):
        build_optimizer(make_model(), ADAMW | {"name": "lion"}, fused=False)
