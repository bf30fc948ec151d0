"""Files that are whole or absent: written under a temporary name, then renamed."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def user_cache() -> Path:
    """Where the user's copies of data go: `CLIP_TRAIN_CACHE`, if set."""
    return Path(os.environ.get("CLIP_TRAIN_CACHE") or user_cache_path("clip_train"))


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` so that a crash, or another process writing the same, never leaves half of it under `path`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
