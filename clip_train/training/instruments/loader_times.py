"""What loading a sample costs, stage by stage, and what to change when training waits for it."""

from collections import Counter
from collections.abc import Mapping

_REMEDIES = {
    "read": "keep the shards on a faster disk (data.cache_dir stages remote ones)",
    "decode": "store smaller pictures (clip-shards make image_size=...)",
    "augment": "do without randaugment and color_jitter",
    "tokenize": "shorten the captions",
    "collate": "lower the batch size per process",
    "transfer": "check that the accelerator has its full bus width",
}


class LoaderTimes:
    """Adds up what batches report.

    Args:
        num_workers: loader processes of this rank.
        cpus: processors this rank may use.
        decode: the setting of that name.
    """

    def __init__(self, num_workers: int, cpus: int, decode: str) -> None:
        self.num_workers, self.cpus, self.decode = num_workers, cpus, decode
        self._seconds: Counter[str] = Counter()
        self._samples = 0

    def add(self, seconds: Mapping[str, float], samples: int) -> None:
        """The seconds that one batch spent in each stage."""
        self._seconds.update(seconds)
        self._samples += samples

    def metrics(self) -> dict[str, float]:
        """Milliseconds per sample of each stage, since `forget`."""
        return {f"data/{stage}_ms": 1e3 * spent / max(self._samples, 1) for stage, spent in self._seconds.items()}

    def forget(self) -> None:
        """Begin a new window."""
        self._seconds.clear()
        self._samples = 0

    def advice(self) -> str | None:
        """What to change if training waits, by the stage that takes longest; None if nothing has been told."""
        if not self._seconds:
            return None
        stage, spent = self._seconds.most_common(1)[0]
        share = spent / max(sum(self._seconds.values()), 1e-9)
        return f"{self._remedy(stage)}, as {share:.0%} of loading is {_GERUND[stage]}"

    def _remedy(self, stage: str) -> str:
        if stage != "transfer" and self.num_workers < self.cpus:
            return f"raise data.num_workers ({self.num_workers}, of {self.cpus} processors)"
        if stage == "decode" and self.decode == "exact":
            return "set data.decode=fast"
        return _REMEDIES[stage]


_GERUND = {
    "read": "reading shards",
    "decode": "decoding pictures",
    "augment": "resizing and augmenting",
    "tokenize": "tokenizing captions",
    "collate": "assembling batches",
    "transfer": "copying to the device",
}
