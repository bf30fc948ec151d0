"""A trainer's state at the end of a step, held still while training goes on."""

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from clip_train.checkpoints.tensor_files import Piece


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes.

    Attributes:
        samples_seen: the moment.
        model: weights by name.
        optimizer: state by `optimizer/parameter/name`.
        rest: all else, plain values and small tensors, as `torch.save` writes them; None on ranks but the first.
        ema: averages of weights by the weights' names; empty where none are kept.
    """

    samples_seen: int
    model: dict[str, Piece]
    optimizer: dict[str, Piece]
    rest: bytes | None
    ema: dict[str, Piece] = field(default_factory=dict)


class SnapshotTaker:
    """Copies a state into host memory that it keeps and uses again: the first touch of memory costs more than the copy.

    Only one snapshot at a time is valid.

    Args:
        copy: False leaves tensors that are in host memory already where they are, for writing at once.
    """

    def __init__(self, copy: bool) -> None:
        self.copy = copy
        self._buffers: dict[str, Tensor] = {}

    def take(self, checkpoint: dict[str, Any], rank: int) -> Snapshot:
        """Split and copy Lightning's checkpoint.

        Args:
            checkpoint: with `state_dict`, `optimizer_states`, `samples_seen` and perhaps `ema`; not changed.
            rank: the first one takes all that is not sharded.
        """
        optimizer_tensors, optimizer_rest = _split_optimizers(checkpoint["optimizer_states"])
        rest = {**checkpoint, "state_dict": {}, "optimizer_states": optimizer_rest}
        averages = rest.pop("ema", {})
        return Snapshot(
            checkpoint["samples_seen"],
            model=self._pieces("model", checkpoint["state_dict"], rank),
            optimizer=self._pieces("optimizer", optimizer_tensors, rank),
            rest=None if rank else _serialised(rest),
            ema=self._pieces("ema", averages, rank),
        )

    def _pieces(self, group: str, tensors: dict[str, Tensor], rank: int) -> dict[str, Piece]:
        pieces = {}
        for name, tensor in tensors.items():
            piece = _piece(tensor.detach(), rank)
            if piece is not None:
                local = self._on_host(f"{group}/{name}", piece.local)
                pieces[name] = Piece(local, piece.shape, piece.offset)
        return pieces

    def _on_host(self, name: str, tensor: Tensor) -> Tensor:
        if not self.copy:
            return tensor.cpu()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
        return buffer.copy_(tensor)


def _serialised(values: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


def _split_optimizers(states: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of optimizers by name, and their state dicts without them."""
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []
    for number, state in enumerate(states):
        plain: dict[int, dict[str, Any]] = {}
        for parameter, values in state["state"].items():
            plain[parameter] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            found = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            tensors |= {f"{number}/{parameter}/{name}": value for name, value in found.items()}
        rest.append({**state, "state": plain})
    return tensors, rest


def join_optimizers(tensors: dict[str, Tensor], rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizers' state dicts, of what a snapshot split."""
    for name, tensor in tensors.items():
        number, parameter, key = name.split("/")
        rest[int(number)]["state"][int(parameter)][key] = tensor
    return rest


def _piece(tensor: Tensor, rank: int) -> Piece | None:
    """What of a tensor this rank writes: of a sharded one its own part, of any other all on the first rank."""
    if not isinstance(tensor, DTensor):
        return Piece.whole(tensor) if rank == 0 else None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    coordinate = tensor.device_mesh.get_coordinate() or []
    copies = [place for place, kind in zip(coordinate, tensor.placements, strict=True) if isinstance(kind, Replicate)]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if any(copies) or 0 in shape:
        return None
    return Piece(tensor.to_local(), tuple(tensor.shape), tuple(offset))
