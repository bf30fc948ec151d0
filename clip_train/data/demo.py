"""The built-in demo set, unpacked on first use."""

import hashlib
import shutil
import tarfile
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from clip_train.data.files import user_cache
from clip_train.errors import DataError

DEMO_SCHEME = "demo:"


def unpack_demo(url: str) -> str:
    """`demo:NAME/REST` -> the local path of REST in the built-in set NAME.

    The pack is unpacked once into the user's cache folder (`CLIP_TRAIN_CACHE`, if set). Processes that start together
    each unpack their own copy and the first to finish wins.

    Raises:
        DataError: there is no built-in set of that name.
    """
    name, _, rest = url.removeprefix(DEMO_SCHEME).partition("/")
    pack = files("clip_train") / "assets" / f"{name}.tar.xz"
    if not pack.is_file():
        raise DataError(f"{url}: there is no built-in set {name!r}; the one there is, is demo:emoji")
    with as_file(pack) as path:
        folder = _unpacked(path, name)
    return str(folder / rest)


def _unpacked(pack: Path, name: str) -> Path:
    digest = hashlib.sha256(pack.read_bytes()).hexdigest()[:12]
    root = user_cache() / "demo"
    target = root / f"{name}-{digest}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f"{name}-"))
    try:
        with tarfile.open(pack) as archive:
            archive.extractall(temporary, filter="data")
        (temporary / name).rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
