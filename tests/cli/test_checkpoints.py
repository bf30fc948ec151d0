"""Saving and resuming as a user meets them: killed while saving, a broken file, a full disk, other settings."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clip_train.checkpoints.folder import InvalidCheckpointError, list_checkpoints, read_weights, samples_of, verify
from clip_train.training.loggers.csv_logger import read_metrics
from tests.checkpoints.test_folder import flip
from tests.cli.runs import TINY, clip_train, start_clip_train
from tests.cli.warm_start import run_module

STEPS = 12
RUN = [*TINY, f"max_steps={STEPS}", "data.val.shards=null", "data.num_workers=0", "trainer.log_every=1"]
# Not beside training: on a busy machine a save would be late where the one before takes long.
KEEP_ALL = ["checkpoint.every=3", "checkpoint.keep=9", "checkpoint.asynchronous=false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbs, with a checkpoint after every third step."""
    folder = tmp_path_factory.mktemp("whole")
    done = clip_train(*RUN, f"output_dir={folder}", "run_name=run", *KEEP_ALL)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def tensors(run: Path) -> list:
    """Checksums of the weights and of the optimizer at the end of a run."""
    files = verify(list_checkpoints(run / "checkpoints")[-1]).files
    return [files["model.safetensors"], files["optimizer.safetensors"]]


def losses(run: Path) -> list[tuple[str, str]]:
    return [(row["samples_seen"], row["train/loss"]) for row in read_metrics(run / "metrics.csv")[1]]


def test_cadence_and_what_a_manifest_says(whole):
    checkpoints = list_checkpoints(whole / "checkpoints")
    assert [samples_of(path) for path in checkpoints] == [96, 192, 288, 384]
    about = verify(checkpoints[0]).about
    assert about["config"]["batch_size"] == 32
    assert about["data"]["samples"] > 6000
    assert {"torch", "clip_train", "python"} <= about["environment"].keys()


def test_killed_while_saving_with_the_newest_checkpoint_broken_it_ends_as_if_nothing_had_been(tmp_path, whole):
    run = tmp_path / "run"
    common = [*RUN, f"output_dir={tmp_path}", "run_name=run", "checkpoint.every=1", "checkpoint.keep=3"]
    process = start_clip_train(*common, "resume=auto")
    end = time.monotonic() + 300
    while not (len(list_checkpoints(run / "checkpoints")) >= 2 and list(run.glob("checkpoints/*.tmp"))):
        assert time.monotonic() < end and process.poll() is None, "no save was caught"
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert samples_of(newest) < STEPS * 32
    flip(newest / "optimizer.safetensors")

    resumed = clip_train(*common, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"skipping the checkpoint {newest}: optimizer.safetensors has changed" in resumed.stdout
    assert not list(run.glob("checkpoints/*.tmp"))
    assert tensors(run) == tensors(whole)
    assert losses(run) == losses(whole)


def test_export(tmp_path, whole):
    source, output = list_checkpoints(whole / "checkpoints")[-1], tmp_path / "all.safetensors"
    export = "clip_train.commands.export"
    done = run_module(export, [f"weights={source}", f"output={output}"], os.environ, 300)
    assert done.returncode == 0 and "weights to" in done.stdout, done.stderr
    found = load_file(output)
    assert all(torch.equal(found[name.removeprefix("model.")], weight) for name, weight in read_weights(source).items())
    done = run_module(export, [f"weights={tmp_path}", f"output={output}"], os.environ, 300)
    assert done.returncode == 2
    assert "the folder has neither manifest.json (a checkpoint of ours) nor any of" in done.stderr


def test_what_may_differ_and_what_may_not(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    again = [*RUN[:-3], "data.num_workers=0", f"output_dir={tmp_path}", "run_name=run", "resume=auto", "max_steps=20"]
    other_model = clip_train(*again, "data.val.shards=null", "model.text.width=32")
    assert other_model.returncode == 2
    assert "of another model" in other_model.stderr and "text." in other_model.stderr
    other_data = clip_train(*again, "data.val.shards=null", "seed=3")
    assert other_data.returncode == 2
    assert "seed 3, was 0" in other_data.stderr and "resume.allow=[data]" in other_data.stderr
    assert tensors(run) == tensors(whole)  # nothing was touched

    allowed = clip_train(*again, "data.val.shards=null", "seed=3", "resume.allow=[data]", "batch_size=64")
    assert allowed.returncode == 0, allowed.stderr
    assert "going on with other data" in allowed.stdout and "batch_size=64 (was 32)" in allowed.stdout
    assert samples_of(list_checkpoints(run / "checkpoints")[-1]) == 20 * 64


def test_a_new_run_from_the_weights_of_another(tmp_path, whole):
    source = list_checkpoints(whole / "checkpoints")[0]
    arguments = [*RUN, f"output_dir={tmp_path}", "run_name=run", "max_steps=1", "optim.lr=0", f"init_from={source}"]
    done = clip_train(*arguments)
    assert done.returncode == 0, done.stderr
    found, expected = read_weights(list_checkpoints(tmp_path / "run" / "checkpoints")[0]), read_weights(source)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    wrong = clip_train(*arguments[:-1], f"init_from={source / 'optimizer.safetensors'}", "run_name=wrong")
    assert wrong.returncode == 2 and "are of no layout that is known here" in wrong.stderr


def is_valid(checkpoint: Path) -> bool:
    try:
        return bool(verify(checkpoint).files)
    except InvalidCheckpointError:
        return False


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 110 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=110m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_training_goes_on_while_the_disk_is_full(small_disk, whole):
    filler = small_disk / "filler"
    common = [*RUN, f"output_dir={small_disk}", "run_name=run", "checkpoint.every=3", "checkpoint.keep=1"]
    command = [sys.executable, "-m", "clip_train.commands.train", *common]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line)
        if "saved" in line and not filler.exists():
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 16)):
                        pass
                except OSError:
                    pass
        if "COULD NOT SAVE A CHECKPOINT" in line:
            process.send_signal(signal.SIGSTOP)
            assert any(is_valid(path) for path in list_checkpoints(small_disk / "run" / "checkpoints"))
            filler.write_bytes(b"")
            process.send_signal(signal.SIGCONT)
    assert process.wait() == 0, "".join(said)
    assert any("COULD NOT SAVE A CHECKPOINT" in line and "No space left" in line for line in said)
    assert tensors(small_disk / "run") == tensors(whole)
    assert losses(small_disk / "run") == losses(whole)
