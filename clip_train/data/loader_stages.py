"""Where a loader's time goes."""

import time

STAGES = ("read", "decode", "augment", "tokenize", "collate")


class StageClock:
    """Attributes the time between two laps to a stage.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What passed since the last lap was `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now
