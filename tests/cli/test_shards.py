"""clip-shards as it is typed: what it prints, what it leaves, how it exits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clip_train.commands.program import config_dir
from clip_train.commands.shards import main
from tests.conftest import make_sample, write_shard
from tests.data.failing_server import Fault, failing_server
from tests.shard_tools.options import write_table

ALONE = ("num_workers=1",)
COMMANDS = ("make", "index", "subset", "verify", "stats", "bench")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `clip-shards` in this process; returns the exit code and what it printed."""

    def clip_shards(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clip-shards", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, captured.out, captured.err

    return clip_shards


@pytest.fixture
def fail(run):
    """Run what must be refused; returns the one line it prints."""

    def clip_shards(*arguments: object) -> str:
        code, _, error = run(*arguments)
        assert code == 2
        assert error.startswith("clip-shards")
        assert error.count("\n") == 1
        return error

    return clip_shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_make_then_index_verify_stats_and_bench(run, tmp_path):
    code, out, _ = run(
        "make", f"source={write_table(tmp_path, 25)}", f"output={tmp_path}/shards", "num_shards=3", *ALONE
    )
    assert code == 0
    assert "3 shards of 8 or 9 samples" in out
    pattern = f"shards={tmp_path}/shards/{{00000..00002}}.tar"

    code, out, _ = run("index", pattern, *ALONE)
    assert code == 0
    assert "3 shards, 25 samples" in out
    assert len(list((tmp_path / "shards").glob("*.index"))) == 3

    code, out, _ = run("verify", pattern, "num_workers=2")
    assert code == 0
    assert "decoded 25 of 25 samples" in out
    assert "no damage found" in out

    code, out, _ = run("stats", pattern, f"output={tmp_path}/stats", "num_workers=1", "num_samples=20")
    assert code == 0
    assert "3 shards, 25 samples" in out
    assert sorted(contents(tmp_path / "stats")) == ["histograms.png", "samples.png", "stats.json"]
    assert json.loads((tmp_path / "stats" / "stats.json").read_text())["num_measured"] == 20

    options = ("num_workers=[0,1]", "seconds=0.1", "batch_size=4", "image_size=16")
    code, out, _ = run("bench", pattern, *options, "samples_per_second=0.1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["read", "0", "1"]
    assert out.endswith("suggested: data.num_workers=1\n")
    assert "none reaches 1e+12" in run("bench", pattern, *options, "samples_per_second=1e12")[1]


def test_a_killed_make_goes_on_when_it_is_started_again(run, tmp_path):
    arguments = (f"source={write_table(tmp_path, 2000, bad=[7])}", "samples_per_shard=500", "shuffle=true", *ALONE)
    command = [sys.executable, "-m", "clip_train.commands.shards", "make", *arguments, f"output={tmp_path}/cut"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    parts = tmp_path / "cut" / ".parts"
    end = time.monotonic() + 120
    while not list(parts.glob("*.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cut").glob("*.tar"))
    assert 0 < len(list(parts.glob("*.json"))) < 4
    assert run("make", *arguments, f"output={tmp_path}/cut")[0] == 0
    assert run("make", *arguments, f"output={tmp_path}/whole")[0] == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sorted(json.loads((tmp_path / "cut" / "sizes.json").read_text()).values()) == [499] + [500] * 3


def test_subset_keeps_the_samples_of_a_list(run, fail, make_shards, tmp_path):
    pattern = f"shards={'::'.join(make_shards([6, 6]))}"
    (tmp_path / "keys.txt").write_text("000001\n000007\n000099\n")
    arguments = (pattern, f"keys={tmp_path}/keys.txt", f"output={tmp_path}/out", *ALONE)
    code, out, _ = run("subset", *arguments)
    assert code == 0
    assert out.startswith(f"1 shards in {tmp_path}/out: kept 2 of 12 samples; 1 of 3 in the list are in none")
    assert run("verify", f"shards={tmp_path}/out/*.tar", *ALONE)[0] == 0
    assert "give exactly one of uids= and keys=" in fail("subset", pattern, "output=x", *ALONE)
    assert "no such file" in fail("subset", pattern, "output=x", "uids=absent.npy", *ALONE)


def test_verify_reports_damage_and_exits_with_1(run, tmp_path):
    damage = {3: {"png": b"junk"}, 5: {"txt": " "}, 6: {"txt": ""}}
    shard = write_shard(tmp_path / "00000.tar", [make_sample(i) | damage.get(i, {}) for i in range(20)])
    (tmp_path / "00001.tar").write_text("no tar" * 100)
    code, out, _ = run("verify", f"shards={tmp_path}/*.tar", f"report={tmp_path}/report.csv", *ALONE)
    assert code == 1
    assert "image_unreadable         1   5.00%" in out
    assert "caption_empty            2  10.00%" in out
    assert "shard_unreadable         1\n" in out
    assert f"{shard} 000005: empty caption" in out
    assert "00001.tar is not a tar file" in out
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert lines[0] == "kind,place,key,detail"
    assert len(lines) == 5
    assert f"caption_empty,{shard},000005,empty caption" in lines


def test_make_says_what_it_skipped(run, tmp_path):
    table = write_table(tmp_path, 200, bad=[3])
    code, out, _ = run("make", f"source={table}", f"output={tmp_path}/shards", *ALONE)
    assert code == 0
    assert "199 samples" in out
    assert "image_unreadable         1   0.50%" in out
    assert "skipped 1, all listed in" in out


def test_too_many_bad_records(fail, tmp_path):
    table = write_table(tmp_path, 20, bad=range(5))
    line = fail("make", f"source={table}", f"output={tmp_path}/shards", *ALONE)
    assert "5 of 20 records cannot be used (5 image_unreadable), more than max_bad_fraction=0.01" in line


def test_user_errors(fail, tmp_path, make_shards):
    make_shards([3])
    shards = f"shards={tmp_path}/shards/*.tar"
    assert "did you mean verify?" in fail("verfy")
    assert "there are make, index" in fail("train")
    assert "output has no value: give output=..." in fail("make", f"source={tmp_path}")
    assert "did you mean source?" in fail("make", "sourc=a.csv")
    assert "does not exist" in fail("make", "source=none.csv", f"output={tmp_path}/out")
    assert "image_size: " in fail("make", f"source={tmp_path}", f"output={tmp_path}/x", "image_size=large")
    assert "shards has no value: give shards=..." in fail("verify")
    assert "no file matches" in fail("verify", "shards=/none/*.tar")
    assert "00001.tar does not exist" in fail("index", f"shards={tmp_path}/shards/{{00000..00001}}.tar")
    assert "cache_size=much is not a size" in fail("stats", shards, "cache_size=much")
    assert "image_key=tiff: no shard has such files" in fail("verify", shards, "image_key=tiff")
    assert "num_workers=0" in fail("verify", shards, "num_workers=0")
    assert "num_samples=0" in fail("stats", shards, "num_samples=0")
    assert "cannot be written" in fail("stats", shards, "output=/dev/null/stats", *ALONE)
    assert "cannot be written" in fail("verify", shards, "report=/none/report.csv", *ALONE)
    assert "samples_per_second: Value 'fast'" in fail("bench", shards, "samples_per_second=fast")
    assert "caption_key=text" in fail("bench", shards, "caption_key=text")
    (tmp_path / "file").touch()
    assert "give cache_dir=" in fail("index", shards, f"cache_dir={tmp_path}/file/x", *ALONE)
    (tmp_path / "shards" / "00000.tar").write_text("junk")
    assert "is not a tar" in fail("index", shards, *ALONE)
    assert "is not a tar" in fail("stats", shards, *ALONE)


def test_remote_shards(run, fail, tmp_path, make_shards):
    cache = (f"cache_dir={tmp_path}/cache", "retries=0", *ALONE)
    with failing_server() as server:
        urls = [server.add(f"/{Path(shard).name}", Path(shard).read_bytes()) for shard in make_shards([5, 4])]
        pattern = f"shards={server.url}/{{00000..00001}}.tar"
        assert "2 shards, 9 samples" in run("index", pattern, *cache)[1]
        code, out, _ = run("verify", pattern, *cache)
        assert (code, "decoded 9 of 9 samples" in out) == (0, True)
        assert run("stats", pattern, f"output={tmp_path}/stats", *cache)[0] == 0
        assert server.requests == ["/00000.tar", "/00001.tar"]  # once for all
        other = f"cache_dir={tmp_path}/other"
        code, out, _ = run("bench", pattern, other, "num_workers=0", "seconds=1", "batch_size=4", "image_size=16")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()[2:5]] == ["download", "read", "0"]
        assert f"shard {urls[1][:-5]}2.tar: it does not exist" in fail("index", f"shards={urls[1][:-5]}2.tar", *cache)
        server.faults["/00000.tar"] = [Fault(500)] * 9
        nothing = (f"cache_dir={tmp_path}/nothing", *cache[1:])
        assert "given up after 1 attempts: 500" in fail("stats", pattern, *nothing)
        assert "cache_size=1 KB: raise that" in fail("verify", pattern, *nothing, "cache_size=1KB")
        assert "unknown scheme" in fail("verify", "shards=ftps3://x/0.tar", *cache)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_key(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    config = OmegaConf.load(f"{config_dir()}/shards_{command}.yaml")
    keys = [key for key in config if key not in ("defaults", "hydra")]
    explained = out.partition("keys:")[2].partition("defaults:")[0].replace(",", " ")
    named = {word for line in explained.splitlines() for word in line.split()[:2]}
    assert set(keys) <= named
    assert sum(line.startswith(f"  clip-shards {command}") for line in out.splitlines()) >= 2


def test_completion(run, monkeypatch):
    assert "complete" in run("-sc", "install=bash")[1]
    for line, words in {
        "clip-shards ": "make index subset verify stats bench",
        "clip-shards stats num_s": "num_samples=",
    }.items():
        monkeypatch.setenv("COMP_LINE", line)
        assert run("-sc", "query=bash")[1].split() == words.split()


def test_help_lists_the_commands_and_answers_without_torch(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert run()[1] == out
    imported = "import sys, clip_train.commands.shards; assert not {'torch', 'PIL', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], check=False).returncode == 0
