import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clip_train.data import index as index_module
from clip_train.data.index import ABSENT, load_index, load_indexes
from clip_train.errors import DataError
from tests.conftest import make_sample, write_shard


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The shards that were scanned, in order."""
    scanned: list[str] = []
    original = index_module.scan_tar
    monkeypatch.setattr(index_module, "scan_tar", lambda path: scanned.append(path) or original(path))
    return scanned


def test_extents_point_at_the_bytes(make_shards):
    (shard,) = make_shards([3])
    index = load_index(shard)
    assert index.extensions == ("json", "png", "txt")
    assert (index.num_samples, index.files_per_extension) == (3, (3, 3, 3))
    with open(shard, "rb") as file:
        for number in range(3):
            offset, size = index.read_extents()[number, 2]
            assert os.pread(file.fileno(), size, offset).decode() == make_sample(number)["txt"]


def test_scanned_once_then_memory_mapped(make_shards, scans):
    (shard,) = make_shards([3])
    first, second = load_index(shard), load_index(shard)
    assert scans == [shard]
    assert first.is_kept and second.is_kept
    assert np.array_equal(first.read_extents(), second.read_extents())


def test_rebuilt_when_the_tar_changed(make_shards, scans):
    (shard,) = make_shards([3])
    load_index(shard)
    make_shards([4])
    assert load_index(shard).num_samples == 4
    os.utime(shard, ns=(1, 1))
    assert load_index(shard).num_samples == 4
    assert len(scans) == 3


@pytest.mark.parametrize("damage", [b"", b"x" * 7, b"\xff" * 100, None])
def test_rebuilt_when_the_index_is_damaged(make_shards, damage):
    (shard,) = make_shards([3])
    load_index(shard)
    path = f"{shard}.index"
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[:-8] if damage is None else damage)
    assert load_index(shard).num_samples == 3


def test_cache_dir(make_shards, tmp_path, scans):
    (shard,) = make_shards([3])
    for _ in range(2):
        assert load_index(shard, str(tmp_path / "cache")).num_samples == 3
    assert len(scans) == 1
    assert not os.path.exists(f"{shard}.index")


def test_unwritable_cache_is_no_error(make_shards, tmp_path):
    (shard,) = make_shards([3])
    (tmp_path / "file").write_text("not a folder")
    assert load_index(shard, str(tmp_path / "file" / "cache")).num_samples == 3


def test_ranks_begin_at_different_shards_and_agree(make_shards, scans, monkeypatch):
    monkeypatch.setattr(index_module, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))  # scans in a fixed order
    shards = make_shards([1, 2, 3, 4])
    indexes = load_indexes(shards, rank=1, world_size=2)
    assert [index.shard for index in indexes] == shards
    assert scans == [shards[2], shards[3], shards[0], shards[1]]


def test_absent_files_and_metadata(tmp_path):
    samples = [make_sample(0), {k: v for k, v in make_sample(1).items() if k != "txt"}]
    index = load_index(write_shard(tmp_path / "a.tar", samples))
    assert index.files_per_extension == (2, 2, 1)
    assert index.read_extents()[1, 2, 0] == ABSENT


def test_a_key_twice(tmp_path):
    with pytest.raises(DataError, match="twice"):
        load_index(write_shard(tmp_path / "a.tar", [make_sample(0), make_sample(0)]))


def test_no_samples(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        load_index(write_shard(tmp_path / "a.tar", []))
