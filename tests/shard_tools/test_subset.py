"""Subsets: the samples of a list and no others, however it is written and however often one is interrupted."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet, table

from clip_train.errors import ConfigError, DataError
from clip_train.shard_tools import subset
from clip_train.shard_tools.subset import SubsetOptions, subset_shards
from clip_train.shard_tools.uid_list import find_in_list, uid_number
from tests.conftest import make_sample, write_shard
from tests.shard_tools.options import access, options

PAIR = np.dtype("u8,u8")


def uid_of(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


def with_uid(number: int) -> dict:
    return make_sample(number) | {"json": {"uid": uid_of(number), "url": f"place {number}"}}


def save_uids(path: Path, uids: list[str]) -> Path:
    """As DataComp's README says to make one."""
    pairs = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], PAIR)
    pairs.sort()
    np.save(path, pairs)
    return path


def samples_of(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """The files of each sample of each shard, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        samples = found.setdefault(path.name, {})
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
    return found


@pytest.fixture
def pool(tmp_path) -> list[str]:
    """Three shards of 20 samples, the number of each in its name and its uid."""
    return [
        write_shard(tmp_path / f"pool{shard}.tar", [with_uid(20 * shard + i) for i in range(20)]) for shard in range(3)
    ]


@pytest.fixture
def take(pool, tmp_path):
    """`take(uids=PATH)` writes a subset of the pool to `out`."""

    def run(**changes):
        changes = {"output": str(tmp_path / "out"), "num_workers": 1, "samples_per_shard": 8, **changes}
        changes = {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
        return subset_shards(pool, options(SubsetOptions, "subset", **changes), access())

    return run


WANTED = [3, 58, 21, 4, 41, 19, 20, 22, 23, 40]


def test_the_samples_of_the_list_as_they_were_in_equal_shards(take, pool, tmp_path):
    elsewhere = [uid_of(number) for number in range(1000, 1005)]
    uids = save_uids(tmp_path / "list.npy", [*map(uid_of, WANTED), *elsewhere])
    report = take(uids=uids)
    assert (report.num_samples, report.num_kept, report.num_listed, report.num_missing) == (60, 10, 15, 5)
    assert report.num_without_uid == 0
    found = samples_of(tmp_path / "out")
    assert {name: len(samples) for name, samples in found.items()} == {"00000.tar": 5, "00001.tar": 5}
    written = {key: files for samples in found.values() for key, files in samples.items()}
    assert list(written) == [f"{number:06d}" for number in sorted(WANTED)]
    before = {key: files for samples in samples_of(tmp_path).values() for key, files in samples.items()}
    assert written == {key: before[key] for key in written}
    out = tmp_path / "out"
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 5, "00001.tar": 5}
    assert json.loads((out / "report.json").read_text())["num_kept"] == 10
    assert not (out / ".parts").exists()


def test_a_list_may_be_text_parquet_or_names_of_samples(take, tmp_path):
    uids = [uid_of(number) for number in WANTED]
    (tmp_path / "uids.txt").write_text("\n".join(uids).upper() + "\n\n")
    parquet.write_table(table({"uid": uids, "url": uids}), tmp_path / "uids.parquet")
    (tmp_path / "keys.txt").write_text("\n".join(f"{number:06d}" for number in WANTED))
    npy = save_uids(tmp_path / "uids.npy", uids)
    lists = [{"uids": npy}, *({"uids": tmp_path / f"uids.{form}"} for form in ("txt", "parquet"))]
    contents = []
    for number, one in enumerate([*lists, {"keys": tmp_path / "keys.txt"}]):
        out = tmp_path / f"out{number}"
        assert take(output=out, **one).num_missing == 0
        contents.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
    assert len(contents[0]) == 2
    assert all(content == contents[0] for content in contents)


def test_several_processes_write_the_same_bytes(take, tmp_path):
    uids = save_uids(tmp_path / "list.npy", [uid_of(number) for number in range(0, 60, 2)])
    take(uids=uids, output=tmp_path / "one")
    take(uids=uids, output=tmp_path / "two", num_workers=2)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("one", "two"))
    assert len(one) == 4 and one == two


def test_an_interrupted_subset_goes_on(take, tmp_path, monkeypatch):
    uids = save_uids(tmp_path / "list.npy", [uid_of(number) for number in range(0, 60, 2)])
    take(uids=uids, output=tmp_path / "whole")
    select, write, done = subset.select_samples, subset.write_shard, []

    def one_only(function):
        def run(task):
            if len(done) % 2:
                raise KeyboardInterrupt
            done.append(task)
            return function(task)

        return run

    for name, function in (("select_samples", select), ("write_shard", write)):
        monkeypatch.setattr(subset, name, one_only(function))
        with pytest.raises(KeyboardInterrupt):
            take(uids=uids)
        done.append(None)
        monkeypatch.setattr(subset, name, function)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    assert not (tmp_path / "out" / "sizes.json").exists()
    monkeypatch.setattr(subset, "select_samples", None)  # all were looked through
    assert take(uids=uids).num_kept == 30
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*")} for name in ("out", "whole")]
    assert contents[0] == contents[1]
    with pytest.raises(DataError, match=r"holds another subset .*samples_per_shard"):
        take(uids=uids, samples_per_shard=3)


def test_a_uid_that_is_listed_twice_is_written_twice(take, tmp_path):
    uids = save_uids(tmp_path / "list.npy", [uid_of(7), uid_of(7), uid_of(9)])
    report = take(uids=uids)
    assert (report.num_kept, report.num_missing) == (3, 0)
    assert list(samples_of(tmp_path / "out")["00000.tar"]) == ["000007", "000007_", "000009"]


def test_samples_without_uid_are_left_out_and_counted(tmp_path):
    samples = [with_uid(0), make_sample(1), with_uid(2), make_sample(3) | {"json": b"{"}]
    shards = [write_shard(tmp_path / "pool.tar", samples), write_shard(tmp_path / "none.tar", [make_sample(4)])]
    uids = save_uids(tmp_path / "list.npy", [uid_of(number) for number in range(4)])
    chosen = options(SubsetOptions, "subset", uids=str(uids), output=str(tmp_path / "out"), num_workers=1)
    report = subset_shards(shards, chosen, access())
    assert (report.num_kept, report.num_without_uid, report.num_missing) == (2, 3, 2)


def test_numbers_are_found_by_both_words():
    numbers = sorted(np.random.default_rng(0).integers(0, 4, (300, 2)).tolist())  # many with the same high word
    pairs = np.array([tuple(pair) for pair in numbers], PAIR)
    for high in range(5):
        for low in range(5):
            ((first, end),) = find_in_list(pairs, [(high << 64) + low])
            assert end - first == numbers.count([high, low])
            assert numbers[first:end] == [[high, low]] * (end - first)
    assert find_in_list(pairs, []) == []
    assert uid_number("0x12") is None and uid_number("1_2") is None and uid_number(12) is None
    assert uid_number("f" * 32) == 2**128 - 1 and uid_number("f" * 33) is None


def test_lists_that_cannot_be_used_are_refused_and_the_folder_stays_free(take, tmp_path):
    good = save_uids(tmp_path / "good.npy", [uid_of(1), uid_of(2)])
    np.save(tmp_path / "unsorted.npy", np.load(good)[::-1])
    np.save(tmp_path / "numbers.npy", np.arange(4))
    np.save(tmp_path / "empty.npy", np.zeros(0, PAIR))
    (tmp_path / "cut.npy").write_bytes(good.read_bytes()[:-7])
    (tmp_path / "no.txt").write_text("not a uid\n")
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (
        ("unsorted.npy", "is not sorted, first at entry 1"),
        ("numbers.npy", "int64"),
        ("empty.npy", "is empty"),
        ("cut.npy", "no whole .npy file"),
        ("no.txt", "entry 1: 'not a uid' is no uid"),
        ("empty.txt", "is empty"),
        ("absent.npy", "no such file"),
    ):
        with pytest.raises(DataError, match=message) as refused:
            take(uids=tmp_path / name)
        assert name in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="give uids="):
        take(keys=good)
    with pytest.raises(ConfigError, match="exactly one of uids= and keys="):
        take(keys=good, uids=good)
    assert take(uids=good).num_kept == 2


def test_shards_that_cannot_be_used_are_refused(take, make_shards, pool, tmp_path):
    elsewhere = save_uids(tmp_path / "elsewhere.npy", [uid_of(1000)])
    with pytest.raises(DataError, match=r"elsewhere\.npy names none of the 60 samples"):
        take(uids=elsewhere, output=tmp_path / "none")
    uids = save_uids(tmp_path / "list.npy", [uid_of(1)])
    chosen = options(SubsetOptions, "subset", uids=str(uids), output=str(tmp_path / "out"), num_workers=1)
    with pytest.raises(DataError, match=r"none of the \d+ samples has a uid in its \.json.*give keys="):
        subset_shards(make_shards([4]), chosen, access())
    content = Path(pool[1]).read_bytes()
    Path(pool[1]).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"pool1\.tar"):
        take(uids=uids, output=tmp_path / "cut")
