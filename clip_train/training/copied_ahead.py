"""The next batch goes to the device while the device computes the present step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from clip_train.data.batches import Batch


class SentBatch:
    """A batch whose copy to the device has begun. (No dataclass: Lightning would look inside.)

    Args:
        copied: recorded on the stream of the copy, behind it.
    """

    def __init__(self, batch: Batch, device: torch.device, copied: Any) -> None:
        self.batch, self.device, self.copied = batch, device, copied

    def arrived(self) -> Batch:
        """The batch, for what is computed from now on: the device waits for the copy, the host does not."""
        torch.get_device_module(self.device).current_stream(self.device).wait_event(self.copied)
        return self.batch


@dataclass(frozen=True)
class CopiedAhead:
    """A loader whose batches set out for the device when they are fetched, which Lightning does one step ahead.

    Attributes:
        loader: of batches on the host, pinned where the device is a GPU.
        send: a batch to the device, without waiting.
        device: which a stream of its own copies to.
    """

    loader: Iterable[Batch]
    send: Callable[[Batch], Batch]
    device: torch.device

    def __iter__(self) -> Iterator[SentBatch]:
        accelerator = torch.get_device_module(self.device)
        stream = accelerator.Stream()
        for batch in self.loader:
            # Memory of an earlier batch may be used again, once the steps that are under way have read it.
            stream.wait_stream(accelerator.current_stream(self.device))
            with accelerator.stream(stream):
                sent = self.send(batch)
            yield SentBatch(sent, self.device, stream.record_event())
