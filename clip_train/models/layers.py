"""How deep in its tower a parameter lies, and what a tower repeats."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clip_train.errors import ConfigError
from clip_train.models.fast_layers import PatchProjection

_PRODUCTS = (nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention, nn.Conv2d, PatchProjection)
_LISTS = (nn.ModuleList, nn.ModuleDict)


def layer_numbers(tower: nn.Module) -> dict[str, int]:
    """The layer of each parameter, by its name in the tower.

    0 is what comes before the blocks, then come the blocks, and the last number is what comes after them: final norm,
    pooling and projection. BEiT counts so (Bao et al., 2022, arXiv:2106.08254).

    Raises:
        ConfigError: there are no blocks to count.
    """
    trunk = tower.get_submodule("trunk")
    names = [name for name, _ in tower.named_parameters()]  # in the order of use
    inside = {id(p) for block in blocks_of(trunk) for p in block.parameters()}
    places = [place for place, (_, p) in enumerate(tower.named_parameters()) if id(p) in inside]
    if not places:
        raise ConfigError(f"layer_decay: {type(trunk).__name__} has no blocks to count: leave it null")
    matcher = getattr(trunk, "group_matcher", None)  # timm's models know theirs
    found = _in_row(trunk) if matcher is None else group_parameters(trunk, matcher(coarse=False), reverse=True)
    within = {name: cast(int, found[name.removeprefix("trunk.")]) for name in names[places[0] : places[-1] + 1]}
    last = max(within.values()) + 1
    return {name: 0 if place < places[0] else within.get(name, last) for place, name in enumerate(names)}


def _in_row(trunk: nn.Module) -> dict[str, int]:
    blocks = {id(p): number for number, block in enumerate(_longest_row(trunk), 1) for p in block.parameters()}
    return {name: blocks[id(p)] for name, p in trunk.named_parameters() if id(p) in blocks}


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """What a tower is made of, though it be a single block."""
    return repeated_blocks(tower) or _longest_row(tower)


def innermost_blocks(tower: nn.Module) -> list[nn.Module]:
    """What a tower is made of, without what is itself made of blocks, as a convolutional network's stages are.

    A block is in a row, and has two layers with matrices or more: a row of single layers is a part of a block. It is a
    stage instead if the blocks inside hold more than half of its weights. RegNet's blocks are in no row, but attributes
    of one type.
    """
    return list(dict.fromkeys(_inside(tower, _in_list) or _inside(tower, _alike)))


def _inside(module: nn.Module, row: Callable[[nn.Module], Sequence[nn.Module]]) -> list[nn.Module]:
    members, found = set(row(module)), []
    for part in module.children():
        inner, is_called = _inside(part, row), type(part).forward is not nn.Module.forward  # unlike a ModuleList
        is_block = part in members and is_called and 2 * _size(inner) <= _size([part]) and _matrices(part) >= 2
        found += [part] if is_block else inner
    return found


def _in_list(module: nn.Module) -> Sequence[nn.Module]:
    parts = list(module.children())
    alike = len({type(part) for part in parts}) == 1  # or they are parts of a block, as T5's are
    return parts if isinstance(module, nn.Sequential) or (alike and isinstance(module, _LISTS)) else []


def _alike(module: nn.Module) -> Sequence[nn.Module]:
    kinds = Counter(type(part) for part in module.children())
    return [part for part in module.children() if kinds[type(part)] > 1]


def _size(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def _matrices(module: nn.Module) -> int:
    """Layers with weights of a product."""
    return sum(any(p.ndim >= 2 for p in part.parameters(recurse=False)) for part in module.modules())


def _longest_row(module: nn.Module) -> list[nn.Module]:
    rows = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(rows, key=len, default=[])


def repeated_blocks(tower: nn.Module) -> list[nn.Module]:
    """What a tower is made of, inner ones first: transformer blocks, or a convolutional network's blocks and stages."""
    rows = [list(module) for module in tower.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    return [
        block
        for row in reversed(rows)  # modules() names the outer ones first
        if len(row) > 1 and len({type(block) for block in row}) == 1
        for block in row
        if not isinstance(block, nn.ModuleList) and any(True for _ in block.parameters())
    ]


def hidden_matrices(tower: nn.Module) -> set[nn.Parameter]:
    """The matrices, and convolutions over channels, inside a tower's blocks: no embeddings, no projection."""
    parameters = [parameter for block in blocks_of(tower) for parameter in block.parameters()]
    return {p for p in parameters if p.ndim >= 2 and min(p.shape[:2]) > 1}


def product_weights(model: nn.Module) -> set[nn.Parameter]:
    """The matrices that autocast rounds to 16 bits each time they are used, and that nothing takes unrounded."""
    owners: dict[nn.Parameter, bool] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rounds = "weight" in name and _multiplies(module)
            owners[parameter] = owners.get(parameter, True) and rounds
    return {parameter for parameter, rounds in owners.items() if rounds}


def _multiplies(module: nn.Module) -> bool:
    # A subclass may do something else with its weight; torchao's of float8 (float8.py) rounds it further.
    return type(module) in _PRODUCTS or type(module).__module__ == "torchao.float8.float8_linear"
