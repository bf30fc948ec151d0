"""The learning rate as a function of the samples seen: no state to save, none to lose."""

import math


def warmup_cosine(samples_seen: int, *, batch_size: int, warmup_samples: int, total_samples: int) -> float:
    """Factor on the peak rate for the step that begins at `samples_seen`: linear to 1, then a half cosine to 0.

    As in open_clip, the first step of the warm-up is not wasted on a rate of 0.
    """
    if samples_seen < warmup_samples:
        return min(1.0, (samples_seen + batch_size) / warmup_samples)
    progress = (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
