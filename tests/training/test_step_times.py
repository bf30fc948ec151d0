"""The parts of a step: each second goes to the part that takes it, on a processor and on a device with a queue."""

import time
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakSet

import lightning as L
import pytest
import torch

from clip_train.losses import contrastive_loss
from clip_train.models import DualEncoder
from clip_train.training.callbacks.metrics import TrainMetrics
from clip_train.training.instruments import step_times
from clip_train.training.instruments.limits import LimitLine, Settings
from clip_train.training.instruments.loader_times import LoaderTimes
from clip_train.training.instruments.step_times import BACKWARD, DATA, FORWARD, LOSS, OPTIMIZER, PARTS, StepTimes
from clip_train.training.instruments.utilisation import Utilisation
from clip_train.training.module import ClipModule
from tests.training.test_module import BATCH_SIZE, train

SLEEP = 0.2  # beside which all else of a tiny step is little
SETTINGS = Settings("32", False, None, False, False, "auto", None)


def train_metrics(utilisation: Utilisation | None = None, log_every: int = 1) -> TrainMetrics:
    """The callback, with a guard that finds nothing wrong."""
    return TrainMetrics(
        log_every,
        BATCH_SIZE,
        lambda position: {},
        LoaderTimes(0, 2, "fast"),
        cast(Any, SimpleNamespace(note=lambda *_: None, act=lambda *_: None)),
        utilisation or Utilisation({}, None, None),
        LimitLine(SETTINGS),
    )


def slow(function):
    def call(*args, **kwargs):
        time.sleep(SLEEP)
        return function(*args, **kwargs)

    return call


class SlowOptimizer(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        time.sleep(SLEEP)


def slow_backward_loss(image, text, **parameters):
    image.register_hook(lambda _: time.sleep(SLEEP))
    return contrastive_loss(image, text, **parameters)


@pytest.mark.parametrize("part", [DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER])
def test_the_slow_part_of_a_step_is_found(tmp_path, monkeypatch, caplog, part):
    if part == DATA:
        monkeypatch.setattr(ClipModule, "transfer_batch_to_device", slow(ClipModule.transfer_batch_to_device))
    if part == FORWARD:
        monkeypatch.setattr(DualEncoder, "encode_image", slow(DualEncoder.encode_image))
    loss = {LOSS: slow(contrastive_loss), BACKWARD: slow_backward_loss}.get(part, contrastive_loss)
    callbacks = [SlowOptimizer()] if part == OPTIMIZER else []
    metrics = train_metrics()
    with caplog.at_level("INFO"):
        train("32", 3, tmp_path, loss=loss, callbacks=[metrics, *callbacks])
    times = {name: metrics.latest[f"train/time/{name}_ms"] for name in PARTS}
    step = metrics.latest["train/time/step_ms"]
    assert max(times, key=lambda name: times[name]) == part and times[part] >= 1e3 * SLEEP
    assert 0.8 * step <= sum(times.values()) <= step
    assert times["communication"] == 0
    assert f"limited by {'data' if part == DATA else 'compute'}" in caplog.text
    assert metrics.latest["train/data_wait_fraction"] == pytest.approx(times[DATA] / step, abs=0.02)


class Queue:
    """A device whose events come about when it has done what was launched before, and a host with a clock."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.events: WeakSet[QueueEvent] = WeakSet()

    def launch(self, host: float, device: float) -> None:
        """Takes the host so long, and the device so long after that."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def event(self) -> "QueueEvent":
        return QueueEvent(self)


class QueueEvent:
    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        queue.events.add(self)

    def query(self) -> bool:
        return self.at <= self._queue.host

    def record(self) -> None:
        self.at = max(self._queue.device, self._queue.host)

    def elapsed_time(self, end_event: "QueueEvent") -> float:
        return 1e3 * (end_event.at - self.at)


@pytest.mark.parametrize(("host", "device"), [(0.01, 0.1), (0.1, 0.01)])
def test_a_device_is_timed_in_its_own_queue_and_told_from_one_that_waits_for_the_host(monkeypatch, host, device):
    queue = Queue()
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: queue.host))
    times = StepTimes(torch.device("cuda"), queue.event)
    times.begin()
    with times.part(FORWARD):
        queue.launch(host, device)
        with times.part(LOSS):
            queue.launch(host, device)
        queue.launch(host, device)
    with times.part(OPTIMIZER):
        queue.launch(host, device)
    read = times.read()
    step = queue.device  # the host's end comes before
    assert read.seconds[LOSS] == pytest.approx(read.seconds[OPTIMIZER]) == pytest.approx(max(host, device), abs=0.011)
    assert sum(read.seconds.values()) == pytest.approx(step)
    assert read.lag is not None
    assert read.lag == pytest.approx(3 * device + host - 3 * host if device > host else device)
    assert sum(times.read().seconds.values()) == 0


@pytest.mark.parametrize("device", [0.001, 0.01])
def test_a_long_time_between_readings_does_not_fill_memory(monkeypatch, device):
    queue = Queue()
    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: queue.host))
    times = StepTimes(torch.device("cuda"), queue.event)
    times.begin()
    for step in range(5000):
        with times.part(FORWARD), times.part(OPTIMIZER):
            queue.launch(0.005, device)
        if step % 100 == 0:  # a loader that lets the device catch up
            queue.host = max(queue.host, queue.device)
    assert len(queue.events) < 5000
    total = queue.device
    read = times.read()
    assert read.seconds[OPTIMIZER] == pytest.approx(5000 * max(device, 0.005), rel=0.01)
    assert sum(read.seconds.values()) <= total


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_events():
    times, matrix = StepTimes(torch.device("cuda")), torch.ones(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    times.begin()
    with times.part(FORWARD):
        for _ in range(20):
            matrix = matrix @ matrix / 2048
    with times.part(OPTIMIZER):
        matrix += 1
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    read = times.read()
    assert read.lag is not None and read.seconds[FORWARD] > read.seconds[OPTIMIZER] > 0
    assert sum(read.seconds.values()) <= 1.05 * elapsed


def test_what_is_not_wanted_is_not_kept():
    times = StepTimes(torch.device("cpu"))
    with times.part(FORWARD):
        pass
    assert times.read().seconds == dict.fromkeys(PARTS, 0.0)
