"""Where the time of a step goes, without making the host wait for the device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Variable

T = TypeVar("T")

DATA, FORWARD, LOSS, BACKWARD = "data", "forward", "loss", "backward"
OPTIMIZER, COMMUNICATION = "optimizer", "communication"
PARTS: tuple[str, ...] = (DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER, COMMUNICATION)
_MANY = 2048  # marks that are kept before those of the past are added up


class Event(Protocol):
    """A moment in a device's queue, as torch.cuda.Event."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any, /) -> float: ...


@dataclass(frozen=True)
class PartTimes:
    """Seconds since the last reading.

    Attributes:
        seconds: of each of `PARTS`.
        lag: how far the device was behind the host when a step's backward had been launched, the mean over steps: near
            nothing where the device waits for the host. None where the host computes.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    lag: float | None = None


@dataclass(frozen=True)
class _Mark:
    """From here on time belongs to `part`."""

    part: str | None
    host: float
    event: Event | None


class StepTimes:
    """Divides time among parts: each moment belongs to the innermost that is open, or to none.

    On a processor the host's clock says how long. An accelerator works through a queue that the host runs ahead of:
    there, moments are marked in the queue, and read when the host has waited for it anyway. Nothing is kept before
    `begin`.

    Args:
        device: what computes.
        new_event: makes an event of its queue, if it has one; None finds out.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], Event] | None = None) -> None:
        self._new_event = new_event or _event_of(device)
        self._part: str | None = None
        self._marks: list[_Mark] | None = None
        self._forget()

    def begin(self) -> None:
        """Keep times from now on, when the device has nothing left to do."""
        self._marks = []
        self._forget()
        self.enter(self._part)
        self._first = self._marks[0]

    def _forget(self) -> None:
        self._first: _Mark | None = None  # made when device and host were at the same point: clocks are compared by it
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._lags: list[float] = []

    def enter(self, part: str | None) -> None:
        """From here on time belongs to this part; None is to none."""
        self._part = part
        if self._marks is None:
            return
        event = None if self._new_event is None else self._new_event()
        if event is not None:
            event.record()
        self._marks.append(_Mark(part, time.perf_counter(), event))
        half = len(self._marks) // 2
        if len(self._marks) % _MANY == 0 and _is_past(self._marks[half]):
            self._add_up(self._marks[: half + 1])
            del self._marks[:half]

    @contextmanager
    def part(self, name: str | None) -> Iterator[None]:
        """What happens inside belongs to this part, and what follows to that of before."""
        outer = self._part
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """The function, whose time belongs to this part."""

        def call(*args: Any) -> T:
            with self.part(name):
                return function(*args)

        return call

    def read(self) -> PartTimes:
        """Times since the last reading; to be called when the device has nothing left to do."""
        if self._marks is None:
            return PartTimes()
        end = [] if self._new_event else [_Mark(None, time.perf_counter(), None)]
        self._add_up([*self._marks, *end])
        lag = sum(self._lags) / len(self._lags) if self._lags else None
        found = PartTimes(self._seconds, lag)
        self.begin()
        return found

    def _add_up(self, marks: list[_Mark]) -> None:
        for mark, following in pairwise(marks):
            if mark.part is not None:
                self._seconds[mark.part] += _seconds_between(mark, following)
            if mark.part == OPTIMIZER and mark.event is not None and self._first is not None:
                behind = _seconds_between(self._first, mark) - (mark.host - self._first.host)
                self._lags.append(max(behind, 0.0))


def when_computed(loss: Tensor, call: Callable[[], None]) -> None:
    """Call when backward from `loss` has computed every gradient, and before it waits for their exchange.

    DDP and FSDP wait in what they leave to the engine for the end of backward, which is done in the order in which it
    was left there: this comes first.
    """
    engine = cast(Any, Variable)._execution_engine
    loss.register_hook(lambda _: engine.queue_callback(call))


def _event_of(device: torch.device) -> Callable[[], Event] | None:
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return lambda: module.Event(enable_timing=True)


def _is_past(mark: _Mark) -> bool:
    return mark.event is None or mark.event.query()


def _seconds_between(mark: _Mark, following: _Mark) -> float:
    if mark.event is None or following.event is None:
        return following.host - mark.host
    return mark.event.elapsed_time(following.event) / 1e3
