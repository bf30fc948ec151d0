"""The losses that `loss.py` compares, and one measured run of one of them."""

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from measure import PeakMemory, WireBytes, largest_over_ranks, wait_for_all
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.distributed.nn import all_gather
from torch.nn import functional as F

from clip_train.distributed import group_rank, group_size
from clip_train.losses import contrastive_loss, sigmoid_loss, tiles

BLOCK = 64  # rows that are drawn together, so that a batch is the same however many ranks share it
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0  # where the SigLIP paper starts
_LONG_ENOUGH, _MOST_REPEATS = 1.0, 10


@dataclass
class Features:
    """One rank's rows of a batch of unit vectors whose pairs are some 72 degrees apart, all wanting gradients."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def draw(cls, batch: int, dim: int, scale: float, bias: float = 0.0) -> "Features":
        rows = batch // group_size()
        image, text = torch.empty(rows, dim), torch.empty(rows, dim)
        for start in range(0, rows, BLOCK):
            part = slice(start, start + BLOCK)
            generator = torch.Generator().manual_seed(group_rank() * rows + start)
            noise = torch.randn(2, BLOCK, dim, generator=generator)
            image[part] = F.normalize(noise[0], dim=1)
            text[part] = F.normalize(image[part] + 3 * noise[1] / dim**0.5, dim=1)
        return cls(*(tensor.requires_grad_() for tensor in (image, text, torch.tensor(scale), torch.tensor(bias))))

    def forget_gradients(self) -> None:
        for tensor in (self.image, self.text, self.scale, self.bias):
            tensor.grad = None


@dataclass(frozen=True)
class Contender:
    """A loss to be measured.

    Attributes:
        family: `contrastive`, `bf16` or `sigmoid`: what it is compared with, and must agree with.
        bytes_per_logit: what it was seen to hold at its peak for each logit of the batch; 0 if it keeps none.
            open_clip's default took 4.2 GB at 16384 pairs, that is 16.5 bytes: some four fp32 numbers.
        all_logits: whether every rank computes the whole batch's logits, not only those of its own rows.
        several_ranks: whether it is something of its own only where there are several.
    """

    name: str
    loss: Callable[[Features], Tensor]
    family: str = "contrastive"
    bytes_per_logit: float = 0.0
    all_logits: bool = False
    several_ranks: bool = False

    @property
    def dtype(self) -> str:
        return "bf16" if self.family == "bf16" else "fp32"

    def bytes_needed(self, batch: int, ranks: int) -> float:
        """An estimate of what all ranks together hold for logits at the peak."""
        return self.bytes_per_logit * batch**2 * (ranks if self.all_logits else 1)


def _ours(**options: Any) -> Callable[[Features], Tensor]:
    return lambda given: contrastive_loss(given.image, given.text, given.scale, **options)


def _full_logits(given: Features) -> Tensor:
    """The textbook's: all logits on every rank, with gradients through the gathering."""
    image, text = given.image, given.text
    if group_size() > 1:
        image, text = torch.cat(all_gather(image)), torch.cat(all_gather(text))
    logits = given.scale * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _open_clip(autocast: bool = False, **flags: bool) -> Callable[[Features], Tensor]:
    def loss(given: Features) -> Tensor:
        module = ClipLoss(**flags, rank=group_rank(), world_size=group_size())
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return module(given.image, given.text, given.scale)  # pyright: ignore[reportReturnType]

    return loss


def _siglip(dist_impl: str) -> Callable[[Features], Tensor]:
    def loss(given: Features) -> Tensor:
        module = SigLipLoss(rank=group_rank(), world_size=group_size(), dist_impl=dist_impl)
        return module(given.image, given.text, given.scale, given.bias)

    return loss


_EXACT = {"local_loss": True, "gather_with_grad": True}
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("ours gather", _ours(exchange="gather")),
        Contender("ours ring", _ours(exchange="ring")),
        Contender("ours bf16", _ours(matmul_dtype=torch.bfloat16), "bf16"),
        Contender("full logits", _full_logits, bytes_per_logit=16.5, all_logits=True),
        Contender("open_clip default", _open_clip(), bytes_per_logit=16.5, all_logits=True),
        Contender("open_clip local_loss", _open_clip(local_loss=True), bytes_per_logit=16.5, several_ranks=True),
        Contender(
            "open_clip local_loss+gather_with_grad", _open_clip(**_EXACT), bytes_per_logit=16.5, several_ranks=True
        ),
        Contender("open_clip bf16 autocast", _open_clip(autocast=True, **_EXACT), "bf16", bytes_per_logit=20.0),
        Contender("ours sigmoid", lambda f: sigmoid_loss(f.image, f.text, f.scale, f.bias), "sigmoid"),
        *(
            Contender(
                f"open_clip siglip {way}",
                _siglip(way),
                "sigmoid",
                bytes_per_logit=20.0 if way in ("bidir", "shift") else 30.0,  # the others compute their own block twice
                several_ranks=way != "bidir",
            )
            for way in ("bidir", "shift", "reduce", "gather")
        ),
    )
}


def baseline(contender: Contender, ranks: int) -> str:
    """The name of what a contender's figures are divided by: open_clip's with the same, exact gradients."""
    if contender.family == "contrastive":
        return "open_clip default" if ranks == 1 else "open_clip local_loss+gather_with_grad"
    return {"bf16": "open_clip bf16 autocast", "sigmoid": "open_clip siglip bidir"}[contender.family]


@dataclass
class Sample:
    """What one rank measured.

    Attributes:
        seconds: forward and backward.
        peak: bytes at the peak, above the features.
        wire: bytes sent to other ranks; None if they were not counted.
        loss: this rank's value.
        tile_seconds: the part of `seconds` that went into the slice's tiles, if only a slice was computed.
    """

    seconds: float
    peak: int
    wire: float | None
    loss: float
    tile_seconds: float = 0.0


def measure_loss(name: str, batch: int, dim: int, scale: float, count_wire: bool) -> Sample:
    """Forward and backward on one rank of fresh processes.

    The first call gives the memory. Short calls are repeated, and their median is the time. Bytes are counted in a call
    of their own, as counting slows it.
    """
    features, once = _prepare(name, batch, dim, scale)
    with PeakMemory() as peak:
        loss, first = once()
    seconds = [first]
    while len(seconds) < _MOST_REPEATS and largest_over_ranks(sum(seconds)) < _LONG_ENOUGH:
        features.forget_gradients()
        seconds.append(once()[1])
    wire = WireBytes() if count_wire else None
    if wire is not None:
        features.forget_gradients()
        with wire:
            once()
    return Sample(statistics.median(seconds), peak.bytes, None if wire is None else wire.sent, loss)


def measure_slice(name: str, batch: int, dim: int, scale: float, rows: int) -> Sample:
    """As `measure_loss`, with all buffers of the real size, but computing only the first `rows` rows of tiles."""
    _, once = _prepare(name, batch, dim, scale)
    with _first_rows(rows) as spent, PeakMemory() as peak:
        loss, seconds = once()
    return Sample(seconds, peak.bytes, None, loss, sum(spent))


def _prepare(name: str, batch: int, dim: int, scale: float) -> tuple[Features, Callable[[], tuple[float, float]]]:
    """The features, and a function that computes loss and gradients once: returns the loss and the seconds."""
    warnings.filterwarnings("ignore", message=".*torch.distributed.nn.*")
    contender = CONTENDERS[name]
    scale, bias = (_SIGMOID_SCALE, _SIGMOID_BIAS) if contender.family == "sigmoid" else (scale, 0.0)
    # Libraries set themselves up on their first call.
    contender.loss(Features.draw(BLOCK * group_size(), dim, scale, bias)).backward()
    features = Features.draw(batch, dim, scale, bias)

    def once() -> tuple[float, float]:
        wait_for_all()
        begun = time.perf_counter()
        loss = contender.loss(features)
        loss.backward()
        return loss.item(), time.perf_counter() - begun

    return features, once


@contextmanager
def _first_rows(rows: int) -> Iterator[list[float]]:
    """Blocks end after so many of their rows, whatever is computed of them. Gives the seconds each block took."""
    whole, spent = tiles.Rows.tiles, []

    def some(self: tiles.Rows) -> Iterator[tuple[slice, Tensor]]:
        begun = time.perf_counter()
        yield from itertools.takewhile(lambda part: part[0].start < rows, whole(self))
        spent.append(time.perf_counter() - begun)

    tiles.Rows.tiles = some
    try:
        yield spent
    finally:
        tiles.Rows.tiles = whole
