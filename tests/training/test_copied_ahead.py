from contextlib import contextmanager

import pytest
import torch

from clip_train.training.copied_ahead import CopiedAhead


class Device:
    """Stands in for torch.cuda: streams that write down what they do, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = self.current = Stream(self, "main")

    def Stream(self) -> "Stream":
        return Stream(self, "copies")

    def current_stream(self, device: torch.device) -> "Stream":
        return self.current

    @contextmanager
    def stream(self, stream: "Stream"):
        self.current = stream
        yield
        self.current = self.main


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name, self.events = device, name, 0

    def wait_stream(self, other: "Stream") -> None:
        self.device.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events} of {self.name}"

    def wait_event(self, event: str) -> None:
        self.device.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    return device


def test_a_batch_is_waited_for_when_it_is_used_and_not_the_one_behind_it(device):
    def send(number):
        device.log.append(f"{device.current.name} sends {number}")
        return number

    batches = iter(CopiedAhead([0, 1], send, torch.device("cpu")))  # pyright: ignore[reportArgumentType]
    first, second = next(batches), next(batches)
    assert first.arrived() == 0
    device.log.append("step 0")
    assert second.arrived() == 1
    sent = [line for n in (0, 1) for line in ("copies waits for main", f"copies sends {n}")]
    assert device.log == [
        *sent,
        "main waits for event 1 of copies",
        "step 0",
        "main waits for event 2 of copies",
    ]
    assert next(batches, None) is None
