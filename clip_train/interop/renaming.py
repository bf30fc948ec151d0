"""Maps between two layouts of weights: tables that are read in both directions, to the bit."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One weight, or one kind of weights, under two names.

    In names `*` stands for one part between dots, or the rest of one, and `**` for several.

    Attributes:
        ours, theirs: the names, with the same wildcards in the same order.
        to_ours, to_theirs: changes of shape, each other's inverse; None for none.
    """

    ours: str
    theirs: str
    to_ours: Change | None = None
    to_theirs: Change | None = None


@dataclass(frozen=True)
class Fusion:
    """A weight that one layout holds whole and the other in parts, along the first axis.

    Attributes:
        whole: its name.
        parts: the names of the parts, in order.
        shares: how large each is, relative to the others.
    """

    whole: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1, 1, 1)


@dataclass(frozen=True)
class Layout:
    """A layout of weights beside ours.

    Attributes:
        rows: one line per kind of weight; the first that fits counts.
        fused_theirs: what is whole there and in parts here; the parts are called as they would be there.
        fused_ours: what is whole here and in parts there; the parts are called as they would be here.
        ignored: names there of what is no weight, such as masks.
    """

    rows: tuple[Row, ...]
    fused_theirs: tuple[Fusion, ...] = ()
    fused_ours: tuple[Fusion, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    def to_ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights under our names; a name that is in no row stays as it is."""
        ignored = [_pattern(name) for name in self.ignored]
        kept = {n: w for n, w in weights.items() if not any(pattern.fullmatch(n) for pattern in ignored)}
        return _fused(_renamed(_split(kept, self.fused_theirs), self._rows_to_ours), self.fused_ours)

    def from_ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names; a name that is in no row stays as it is."""
        return _fused(_renamed(_split(weights, self.fused_ours), self._rows_from_ours), self.fused_theirs)

    @cached_property
    def _rows_to_ours(self) -> list[tuple[re.Pattern[str], str, Change | None]]:
        return [(_pattern(row.theirs), _template(row.ours), row.to_ours) for row in self.rows]

    @cached_property
    def _rows_from_ours(self) -> list[tuple[re.Pattern[str], str, Change | None]]:
        return [(_pattern(row.ours), _template(row.theirs), row.to_theirs) for row in self.rows]


def _renamed(
    weights: Mapping[str, Tensor], rows: Iterable[tuple[re.Pattern[str], str, Change | None]]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for pattern, template, change in rows:
            if match := pattern.fullmatch(name):
                renamed[template.format(*match.groups())] = change(weight) if change else weight
                break
        else:
            renamed[name] = weight
    return renamed


def _split(weights: Mapping[str, Tensor], fusions: Iterable[Fusion]) -> dict[str, Tensor]:
    """Take apart what is whole."""
    weights = dict(weights)
    for fusion in fusions:
        pattern, templates = _pattern(fusion.whole), [_template(part) for part in fusion.parts]
        for name in [name for name in weights if pattern.fullmatch(name)]:
            whole, match = weights.pop(name), pattern.fullmatch(name)
            assert match
            unit, rest = divmod(len(whole), sum(fusion.shares))
            if rest:  # misshapen; what it should have been is said where shapes are compared
                weights[name] = whole
                continue
            parts = torch.split(whole, [unit * share for share in fusion.shares])
            weights |= {template.format(*match.groups()): part.clone() for template, part in zip(templates, parts)}
    return weights


def _fused(weights: Mapping[str, Tensor], fusions: Iterable[Fusion]) -> dict[str, Tensor]:
    """Put together what has all its parts."""
    weights = dict(weights)
    for fusion in fusions:
        first, templates, whole = _pattern(fusion.parts[0]), fusion.parts, _template(fusion.whole)
        for match in [match for name in weights if (match := first.fullmatch(name))]:
            names = [_template(part).format(*match.groups()) for part in templates]
            if all(name in weights for name in names):
                weights[whole.format(*match.groups())] = torch.cat([weights.pop(name) for name in names])
    return weights


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", "([^.]+)"))


def _template(name: str) -> str:
    return name.replace("**", "{}").replace("*", "{}")
