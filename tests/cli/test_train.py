import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from clip_train.checkpoints.folder import read_weights, verify
from clip_train.commands.program import config_dir
from clip_train.commands.train import main
from clip_train.training.loggers.csv_logger import read_metrics
from tests.cli.embeddings import call
from tests.cli.runs import TINY, clip_train, start_clip_train, train_tiny

NO_VAL = "data.val.shards=null"


def losses(rows: list[dict[str, str]]) -> list[str]:
    return [row["train/loss"] for row in rows]


def test_one_seed_one_result_whatever_the_workers(tmp_path):
    first = train_tiny(tmp_path, "first", "max_steps=5", "data.num_workers=0", NO_VAL)
    second = train_tiny(tmp_path, "second", "max_steps=5", "data.num_workers=3", NO_VAL)
    other = train_tiny(tmp_path, "other", "max_steps=5", "seed=1", NO_VAL)
    assert len(first) == 5
    assert losses(first) == losses(second)
    assert losses(first) != losses(other)


def test_ranks_without_a_run_name_share_a_folder_and_each_has_its_log(tmp_path):
    run = [*TINY, "trainer.devices=2", "data.num_workers=0", "max_steps=2", NO_VAL, "data.sample_log=true"]
    done = clip_train(*run, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    assert len(list((folder / "samples").glob("rank_*.csv"))) == 2
    first, second = folder / "train.log", folder / "logs" / "rank_00001.log"
    assert "[rank 0] INFO process " in first.read_text()
    assert "100%  64/64 samples  step 2  loss " in first.read_text()
    assert "[rank 1] INFO process " in second.read_text()


def documented_metrics() -> list[str]:
    """Patterns of the names in the table of docs/logging.md."""
    page = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()
    cells = re.findall(r"^\| (`[a-z_]+/.*?) \|", page, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [re.sub(r"<\w+>", r"\\w+", name).replace("@K", r"@\d+") for name in names]


def test_a_run_leaves_its_folder(tmp_path):
    rows = train_tiny(tmp_path, "run", "max_steps=3", "eval.every=2 steps", "eval.report=true")
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    files = {".lock", "config.yaml", "metrics.csv", "summary.json", "train.log", "retrieval.png", "report.html"}
    assert names == {*files, "checkpoints"}
    assert "data:image/png;base64," in (folder / "report.html").read_text()
    assert [(row["step"], row["samples_seen"]) for row in rows] == [("1", "32"), ("2", "64"), ("3", "96")]
    columns, all_rows = read_metrics(folder / "metrics.csv")
    for name in ("loss", "logit_scale", "lr", "grad_norm", "samples_per_second", "data_wait_fraction"):
        assert all(float(row[f"train/{name}"]) >= 0 for row in rows), name
    evaluated = [row["step"] for row in all_rows if row["val/unseen_style/loss"]]
    assert evaluated == ["2", "3"]
    assert "val/unseen_concepts/text_to_image_recall@10" in columns
    known = documented_metrics()
    assert [name for name in columns if not any(re.fullmatch(one, name) for one in known)] == ["step", "samples_seen"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["complete"], summary["samples_seen"], summary["steps"]) == (True, 96, 3)
    assert summary["metrics"]["train/loss"] == float(rows[-1]["train/loss"])
    assert {"torch", "python", "host"} <= summary["environment"].keys()
    assert "recall@1 among 1752 pairs" in (folder / "train.log").read_text()

    again = clip_train(*TINY, f"output_dir={tmp_path}", "run_name=run", "max_steps=3")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "resume=auto" in again.stderr

    (folder / "report.html").write_text("as it was")
    complete = clip_train(*TINY, f"output_dir={tmp_path}", "run_name=run", "max_steps=3", "eval.every=2 steps",
                          "eval.report=true", "resume=auto", f"checkpoint.mirror={tmp_path}/mirror")  # fmt: skip
    assert complete.returncode == 0, complete.stderr
    assert verify(tmp_path / "mirror" / "samples_00000000000096.ckpt").samples_seen == 96
    assert (folder / "report.html").read_text() == "as it was"

    # As a sweep, so that its jobs must find the config too.
    repeated = clip_train("--multirun", "--config-dir", str(folder), "--config-name", "config", "run_name=repeated")
    assert repeated.returncode == 0, repeated.stderr
    _, all_again = read_metrics(tmp_path / "repeated" / "repeated_0" / "metrics.csv")
    rows_again = [row for row in all_again if row["train/loss"]]
    assert losses(rows_again) == losses(rows)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopped_by_a_signal_and_resumed_as_if_it_had_not(tmp_path, world_size):
    common = [*TINY, "max_steps=30", NO_VAL, "trainer.log_every=1", f"output_dir={tmp_path}"]
    process = start_clip_train(*common, "run_name=cut", f"trainer.devices={world_size}")
    wait_for_rows(tmp_path / "cut" / "metrics.csv", 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["complete"], summary["stopped_by_signal"]) == (False, True)
    assert 0 < summary["samples_seen"] < 30 * 32

    resumed = clip_train(*common, "run_name=cut", "resume=auto", ranks=world_size)
    assert resumed.returncode == 0, resumed.stderr
    whole = clip_train(*common, "run_name=whole", ranks=world_size)
    assert whole.returncode == 0, whole.stderr
    rows, expected = (read_metrics(tmp_path / name / "metrics.csv")[1] for name in ("cut", "whole"))
    assert len(rows) == 30
    assert losses(rows) == losses(expected)
    files = [verify(newest(tmp_path / name)).files for name in ("cut", "whole")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert files[0][name] == files[1][name]  # the same bytes


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.ckpt"))


def wait_for_rows(path: Path, count: int) -> None:
    end = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end, f"{path} did not grow to {count} lines"
        time.sleep(0.05)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_precisions(tmp_path, precision):
    rows = train_tiny(tmp_path, "run", "max_steps=2", NO_VAL, f"trainer.precision={precision}", "trainer.log_every=1")
    assert len(rows) == 2
    assert all(2 < float(loss) < 6 for loss in losses(rows))


def test_help_has_ten_examples_and_answers_without_torch():
    done = clip_train("--help")
    assert done.returncode == 0
    assert (
        sum(line.startswith("  clip-train") or line.startswith("  torchrun") for line in done.stdout.splitlines()) >= 10
    )
    imported = "import sys, clip_train.commands.train as t; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", imported], check=False).returncode == 0


def test_the_config_that_is_shown_without_data_has_the_defaults_not_the_demo():
    code, out, error = call(main, "--cfg", "job", "batch_size=8")
    assert code == 0, error
    shown, defaults = OmegaConf.create(out), OmegaConf.load(Path(config_dir()) / "train.yaml")
    assert (shown.batch_size, shown.max_epochs) == (8, defaults.max_epochs)
    assert shown.model.vision.name == "vit_base_patch32_clip_224"
    assert OmegaConf.missing_keys(shown) == {"data.train.shards"}


def test_a_run_that_diverges_ends_with_a_report_and_saves_nothing_broken(tmp_path):
    arguments = [*TINY, "optim.lr=1e30", "optim.warmup=0", "max_steps=50", NO_VAL, "checkpoint.every=1"]
    done = clip_train(*arguments, f"output_dir={tmp_path}", "run_name=run")
    assert done.returncode == 70
    assert "training has diverged after" in done.stderr
    assert (tmp_path / "run" / "guard_report.json").exists()
    for path in (tmp_path / "run").glob("checkpoints/*.ckpt"):
        weights = read_weights(path)
        assert all(weight.isfinite().all() for weight in weights.values())


def test_sigmoid_loss_learns_its_bias(tmp_path):
    run = ("loss=sigmoid", "max_steps=3", NO_VAL, "micro_batch_size=8")
    rows = train_tiny(tmp_path, "run", *run)
    assert float(rows[0]["train/logit_scale"]) == pytest.approx(10)
    assert read_weights(newest(tmp_path / "run"))["model.logit_bias"] != -10
    both = train_tiny(tmp_path, "both", *run, "loss.exchange=gather", ranks=2)
    assert [float(row["train/loss"]) for row in both] == pytest.approx([float(r["train/loss"]) for r in rows], rel=1e-5)
