"""The optimizer: which parameters learn how fast, with what decay, by which rule; and its state under new settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from clip_train.errors import ConfigError
from clip_train.models.layers import hidden_matrices, layer_numbers
from clip_train.training.optim.adamw_bf16 import BF16AdamW
from clip_train.training.optim.bad_step import make_skippable

TOWERS = ("vision", "text")
# Of the `optim` group, what is not an argument of the optimizer.
_OURS = ("name", "state", "lr", "weight_decay", "warmup", "grad_clip", "fallback", *TOWERS)


@dataclass(frozen=True)
class Kind:
    """An optimizer that `optim.name` can choose.

    Attributes:
        build: its class, or a function like it.
        can_fuse: whether it takes `fused`, and then leaves out a bad step by itself, without the host.
        can_shard: whether shards of a tensor get the update that the whole tensor would get.
        fixed: arguments that are not the user's to choose.
    """

    build: Callable[..., torch.optim.Optimizer]
    can_fuse: bool = False
    can_shard: bool = True
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _adamw_8bit(*args: Any, **options: Any) -> torch.optim.Optimizer:
    try:
        from clip_train.training.optim.adamw_8bit import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optim.state=8bit needs torchao: pip install '.[torchao]' in the checkout ({error})"
        ) from error
    return AdamW8bit(*args, **options)


OPTIMIZERS = {
    "adamw": Kind(torch.optim.AdamW, can_fuse=True),
    "lion": Kind(timm.optim.Lion),
    "lamb": Kind(timm.optim.Lamb, fixed={"max_grad_norm": None}),  # optim.grad_clip is for all optimizers
    "muon": Kind(timm.optim.Muon, can_shard=False),
    "sgd": Kind(torch.optim.SGD),  # fused, it would spoil its momentum if its first step is a bad one
}
# In place of `adamw`, by `optim.state`. Blocks of 8-bit numbers with a common scale are not those of other shards.
ADAMW_STATES = {
    "fp32": OPTIMIZERS["adamw"],
    "bf16": Kind(BF16AdamW, can_fuse=True),
    "8bit": Kind(_adamw_8bit, can_shard=False),
}


def kind_of(optim: Mapping[str, Any]) -> Kind:
    """What the `optim` group chooses. Raises ConfigError for an optimizer that has its state in fp32 only."""
    name, state = optim.get("name", "adamw"), optim.get("state", "fp32")
    if name == "adamw":
        return ADAMW_STATES[state]
    if state != "fp32":
        raise ConfigError(f"optim.state={state} is for optim=adamw, not for optim={name}: leave it out")
    return OPTIMIZERS[name]


def build_optimizer(model: nn.Module, optim: Mapping[str, Any], fused: bool) -> torch.optim.Optimizer:
    """The optimizer of the `optim` group over the trainable parameters.

    Args:
        model: with the towers `vision` and `text`.
        optim: the group; what is not named here goes to the optimizer's class.
        fused: take the fused form where there is one.

    Raises:
        ConfigError: the class refuses its settings, or its library is not installed.
    """
    kind = kind_of(optim)
    options = _tuples({key: value for key, value in optim.items() if key not in _OURS})
    options |= {**kind.fixed, **({"fused": fused} if kind.can_fuse else {})}
    try:
        optimizer = kind.build(parameter_groups(model, optim), lr=optim["lr"], **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim={optim.get('name', 'adamw')}: {error}") from error
    if not optimizer.defaults.get("fused"):
        make_skippable(optimizer)
    return optimizer


def parameter_groups(model: nn.Module, optim: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trainable parameters, with their names, by what they share: `initial_lr`, the rate at the peak, and decay.

    No decay on what is a vector or a number once axes of size 1 are dropped: biases, gains of norms, class tokens,
    `logit_scale`. That is open_clip's rule. Numbers have a group of their own: where the rest is sharded they are not,
    and a fused optimizer takes no mixture. With `optim.fallback` (Muon) all but the hidden matrices go by it.
    """
    towers = {name: optim.get(name) or {} for name in TOWERS}
    scales, fallback = _layer_scales(model, towers), optim.get("fallback")
    hidden = set() if fallback is None else _hidden_matrices(model)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        sort = 0 if _is_matrix(parameter) else 1 if parameter.ndim else 2
        tower = towers.get(name.partition(".")[0], {})
        rule = {} if fallback is None or parameter in hidden else {"use_fallback": True, **_tuples(fallback)}
        rate = _first(tower.get("lr"), optim["lr"]) * scales.get(name, 1.0) * rule.pop("lr_scale", 1.0)
        decay = 0.0 if sort else _first(tower.get("weight_decay"), optim["weight_decay"])
        group = {"initial_lr": rate, "lr": rate, "weight_decay": decay, **rule}
        groups.setdefault((sort, *group.items()), {**group, "params": []})["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _layer_scales(model: nn.Module, towers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the rates of the parameters of towers with `layer_decay` are multiplied by."""
    scales = {}
    for name, settings in towers.items():
        if (decay := settings.get("layer_decay")) is not None:
            numbers = layer_numbers(model.get_submodule(name))
            last = max(numbers.values())
            scales |= {f"{name}.{parameter}": decay ** (last - number) for parameter, number in numbers.items()}
    return scales


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    parts = [part for name, part in model.named_children() if name in (*TOWERS, "decoder")]
    return {parameter for part in parts for parameter in hidden_matrices(part)}


def _is_matrix(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its share of its rate at the peak."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao compiles its step, for any rate
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def with_settings_of(fresh: torch.optim.Optimizer, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A saved state of an optimizer of the same kind, with the groups and settings of a fresh one.

    Parameters are found by their names, so the groups may be others. Those that were not there begin without a state.

    Args:
        fresh: over the model's parameters.
        state: a saved state dict.
        model: whose parameters those are.
    """
    saved = dict(zip(_names(state, model), _members(state), strict=True))
    groups, found = fresh.state_dict()["param_groups"], {}
    for group in groups:
        known = {number: saved[name] for number, name in zip(group["params"], group["param_names"]) if name in saved}
        found |= {number: values for number, (_, values) in known.items() if values is not None}
        before = next((old for old, _ in known.values()), {})
        group |= {key: value for key, value in before.items() if key not in group}  # LAMB counts its steps there
    return {"state": found, "param_groups": groups}


def _members(state: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Of each parameter, in their order: its group and its own state, if it has one."""
    return [(group, state["state"].get(number)) for group in state["param_groups"] for number in group["params"]]


def _names(state: Mapping[str, Any], model: nn.Module) -> list[str]:
    if "param_names" in state["param_groups"][0]:
        return [name for group in state["param_groups"] for name in group["param_names"]]
    groups = parameter_groups(model, {"lr": 0.0, "weight_decay": 0.0})  # as they all were before names were saved
    return [name for group in groups for name, _ in group["params"]]
