"""What becomes of the data of whole runs: kills, damage, mixtures."""

import csv
import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from clip_train.checkpoints.folder import list_checkpoints, samples_of
from clip_train.training.callbacks.sample_log import read_sample_log
from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.runs import TINY, clip_train, start_clip_train, train_tiny
from tests.cli.warm_start import start_ranks
from tests.data.failing_server import Fault, failing_server
from tests.data.photos import encode

ARGUMENTS = [*TINY, "data.val.shards=null", "data.sample_log=true", "data.num_workers=1"]


@pytest.fixture
def shards(make_shards) -> str:
    return str(Path(make_shards([300, 200, 250, 250])[0]).parent / "*.tar")


def test_killed_at_any_step_and_resumed_on_other_ranks_with_the_same_samples(tmp_path, shards):
    run = [*ARGUMENTS, f"data.train.shards={shards}", f"output_dir={tmp_path}", "batch_size=48", "max_steps=60"]
    whole = clip_train(*run, "run_name=whole")
    assert whole.returncode == 0, whole.stderr
    killed = [*run, "run_name=killed", "resume=auto", "checkpoint.every=7 steps"]
    for ranks in (2, 3):
        last_rank = tmp_path / "killed" / "samples" / f"rank_{ranks - 1:05d}.csv"
        kill_when_longer(last_rank, 5 * 48 // ranks, ranks, killed)
    done = clip_train(*killed)
    assert done.returncode == 0, done.stderr
    expected, found = (read_sample_log(tmp_path / name / "samples") for name in ("whole", "killed"))
    assert list(expected) == [48 * step for step in range(1, 61)]
    assert found == expected
    assert len({name for names in list(expected.values())[:20] for name in names}) == 960  # of 1000: no repetition
    files = {path.name for path in (tmp_path / "killed" / "samples").iterdir()}
    assert files == {f"rank_{rank:05d}.csv" for rank in range(3)}


def kill_when_longer(file: Path, rows: int, ranks: int, arguments: list[str]) -> None:
    """Start a run and SIGKILL all of its ranks when a file has more rows."""
    processes = start_ranks(ranks, "clip_train.commands.train", arguments, os.environ)
    deadline = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) <= rows + 1:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def test_damage_of_six_kinds_is_counted_to_the_sample(tmp_path, make_shards):
    bomb, photo = encode(Image.new("L", (2000, 1500))), encode(Image.new("RGB", (64, 64)), "JPEG")
    damages = [
        ("image_unreadable", {"png": b"broken"}),
        ("image_unreadable", {"png": photo[: len(photo) // 2]}),
        ("image_too_large", {"png": bomb}),
        ("caption_empty", {"json": {"captions": [" \n"]}}),
        ("caption_not_utf8", {"json": b'{"captions": "caf\xe9"}'}),
        ("caption_missing", {"json": {"title": 3}}),
    ]

    def damage(sample: dict) -> dict:
        number = int(sample["__key__"])
        return sample | (damages[number // 100 % 6][1] if number % 100 == 7 else {})

    shards = make_shards([600, 600], damage)
    for name, workers in (("run", 2), ("again", 0)):
        rows = train_tiny(
            *(tmp_path, name, f"data.train.shards={Path(shards[0]).parent}/*.tar", "data.val.shards=null"),
            *("data.caption_key=json:captions", "data.max_image_pixels=2000000", "max_epochs=1"),
            *("batch_size=40", f"data.num_workers={workers}", "data.max_bad_fraction=0.02"),
        )
        assert len(rows) == 30
        counts = {key: float(value) for key, value in rows[-1].items() if key.startswith("data/bad_samples")}
        expected = Counter(kind for kind, _ in damages * 2)
        assert counts == {"data/bad_samples": 12, **{f"data/bad_samples/{k}": n for k, n in expected.items()}}
        with open(tmp_path / name / "bad_samples.csv", newline="") as file:
            listed = list(csv.DictReader(file))
        assert sorted(row["key"] for row in listed) == [f"{n:06d}" for n in range(7, 1200, 100)]
        log = (tmp_path / name / "train.log").read_text()
        assert all(f"bad sample {row['key']} in {row['shard']}: {row['kind']}" in log for row in listed)


def test_a_shard_that_vanishes_during_the_run_ends_it_on_all_ranks(tmp_path, make_shards):
    shards = make_shards([40] * 8)
    arguments = [*ARGUMENTS, f"data.train.shards={Path(shards[0]).parent}/*.tar", "trainer.devices=2"]
    arguments += [f"output_dir={tmp_path}", "run_name=run", "data.lanes=2", "data.shuffle_window=8"]
    process = start_clip_train(*arguments, "max_steps=2000")
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for shard in shards:
        Path(shard).rename(f"{shard}.away")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "clip-train: error: shard" in errors and "cannot be read any more: it does not exist" in errors
    reached = max(_samples(metrics))
    assert samples_of(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]) == reached
    for shard in shards:
        Path(f"{shard}.away").rename(shard)
    process = start_clip_train(*arguments, "resume=auto", f"max_samples={reached + 96}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert _samples(metrics) == list(range(32, reached + 96 + 1, 32))


def _samples(metrics: Path) -> list[int]:
    """Of the steps in a metrics.csv."""
    return [int(float(row["samples_seen"])) for row in read_metrics(metrics)[1] if row["train/loss"]]


def test_a_mixture_keeps_its_shares_and_reports_epochs(tmp_path, make_shards):
    folder = Path(make_shards([60, 60, 240])[0]).parent
    rows = train_tiny(
        *(tmp_path, "run", f"data.train.shards={folder}/0000[01].tar::{folder}/00002.tar", "data.val.shards=null"),
        *("data.train.weights=[3,1]", "data.caption_key=[txt,'json:nested.title']", "data.sample_log=true"),
        *("batch_size=64", "max_steps=64"),
    )
    names = [name for step in read_sample_log(tmp_path / "run" / "samples").values() for name in step]
    assert sum("00002.tar" in name for name in names) == len(names) / 4 == 1024
    assert float(rows[-1]["data/epochs/shards"]) == pytest.approx(3072 / 120, abs=0.01)
    assert float(rows[-1]["data/epochs/shards_1"]) == pytest.approx(1024 / 240, abs=0.01)


def test_waiting_for_data_is_explained(tmp_path, make_shards):
    photo = encode(Image.new("RGB", (1500, 1000)), "PNG")
    shards = make_shards([40], lambda sample: sample | {"png": photo})
    train_tiny(
        *(tmp_path, "run", f"data.train.shards={shards[0]}", "data.val.shards=null", "data.num_workers=0"),
        *("max_steps=4", "trainer.log_every=2"),
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert "limited by data; to try: raise data.num_workers (0" in log and "of loading is decoding pictures" in log
    _, rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["data/decode_ms"]) > float(rows[-1]["data/tokenize_ms"]) > 0


def test_a_failing_server_costs_time_but_no_sample(tmp_path, make_shards):
    paths = [Path(shard) for shard in make_shards([60] * 4)]
    with failing_server() as server:
        for path in paths:
            server.add(f"/{path.name}", path.read_bytes())
            server.faults[f"/{path.name}"] = [Fault(503), Fault(after=5000), Fault(after=9000, stall=True)]
        server.add("/sizes.json", json.dumps({path.name: 60 for path in paths}).encode())
        rows = train_tiny(
            *(tmp_path, "run", f"data.train.shards={server.url}/{{00000..00003}}.tar", "data.val.shards=null"),
            *(f"data.cache_dir={tmp_path}/cache", "data.timeout=1", "data.sample_log=true", "batch_size=40"),
            "max_epochs=2",
        )
    assert len(rows) == 12
    steps = list(read_sample_log(tmp_path / "run" / "samples").values())
    for epoch in (steps[:6], steps[6:]):
        names = sorted(name.rpartition("/")[2] for step in epoch for name in step)
        assert names == sorted(f"{path.name}[{number}]" for path in paths for number in range(60))
    assert float(rows[-1]["data/bad_samples"]) == 0
    assert float(rows[-1]["data/staging_retries"]) == 12  # each fault once, whoever met it
