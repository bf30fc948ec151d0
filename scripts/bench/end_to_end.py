"""Training from shards on a disk, loader included, beside open_clip's own program on the same shards, in one run.

    uv run python scripts/bench/end_to_end.py --out docs/benchmarks
    uv run python scripts/bench/end_to_end.py --device cuda --model vit_b_32 --batch 1024 --steps 60 --workers 16

Both programs run for some steps; the rate is the median of the second half of them. Ours says how much of the time it
waited for data, and is compared with the step alone, on a batch that is on the device. open_clip reads shards with
webdataset before 1.0 only: --open-clip names the Python of an environment that has it, such as `loader.py` makes.
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from captions import SMALL_PHOTOS, Captions, find_captions
from measure import describe_machine, multiplies_bf16, run_ranks
from open_clip_program import open_clip_command
from record import about, add_rows, markdown_table, measured, section_title
from step_contenders import OPEN_CLIP_NAMES, StepJob, measure_step

from clip_train.data.demo import unpack_demo
from clip_train.data.shards import expand_shards

_OTHER_PYTHON = Path("runs/bench/loader/env-open_clip/bin/python")
_RATE = re.compile(r"Train Epoch: 0 .* ([\d.]+)/s, ")
_REPORTS = 8  # of the steps of a run
HEAD = """
# Training from shards, loader included

By `scripts/bench/end_to_end.py`. Medians over rounds of the rate in the second half of the steps; ratios are taken
round by round. `of the step alone` is our rate as a share of that of the same step on a batch that is on the device.
"""


def main() -> None:
    args = _arguments()
    machine = describe_machine()
    captions = find_captions(args.batch, args.shards)
    listed = f"{about(machine)}- data: {args.shards}\n"
    print(listed, flush=True)
    rates, waits, shares, theirs = [], [], [], []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        rate, wait = _ours(args)
        rates, waits = [*rates, rate], [*waits, wait]
        print(f"ours: {rate:.1f} pairs/s\n", flush=True)
        if not args.overrides:  # which the step alone does not know
            shares.append(rate / _step_alone(args, captions))
        try:
            theirs.append(_open_clip(args))
        except RuntimeError as error:
            print(f"open_clip was not measured: {error}\n", flush=True)
    row = {"model": args.model, "batch": str(args.batch), "workers": str(args.workers)}
    row |= {"settings": " ".join(args.overrides), "words per text": f"{captions.words():.1f}"}
    row |= {"ours pairs/s": f"{statistics.median(rates):.1f}", "of it waiting": f"{statistics.median(waits):.0%}"}
    if shares:
        row["of the step alone"] = f"{statistics.median(shares):.0%}"
    if len(theirs) == len(rates):
        row["open_clip pairs/s"] = f"{statistics.median(theirs):.1f}"
        row["ours / open_clip"] = f"{statistics.median(a / b for a, b in zip(rates, theirs)):.2f}"
    row |= measured(machine, args.rounds)
    print(markdown_table(list(row), [list(row.values())]))
    if args.out:
        title = section_title(machine, args.device, args.precision)
        add_rows(args.out / "end_to_end.md", HEAD, title, listed, [row], ("model", "batch", "workers", "settings"))


def _step_alone(args: argparse.Namespace, captions: Captions) -> float:
    """Pairs per second of the step on one batch that is on the device."""
    how = {"device": args.device, "precision": args.precision, "threads": torch.get_num_threads(), "steps": 10}
    job = StepJob("ours, whole batch", args.model, args.batch, 1, captions.texts, **how)
    (sample,) = run_ranks(measure_step, 1, job)
    return args.batch / sample.seconds


def _ours(args: argparse.Namespace) -> tuple[float, float]:
    """Pairs per second, and the share of the time spent waiting for data."""
    with TemporaryDirectory() as folder:
        settings = [f"model={args.model}", f"batch_size={args.batch}", f"max_steps={args.steps}", "run_name=run"]
        settings += [f"output_dir={folder}", f"data.train.shards='{args.shards}'", "data.caption_key=txt"]
        settings += [f"data.num_workers={args.workers}", "data.val.shards=null", "eval.every=null", "eval.report=false"]
        settings += [f"trainer.log_every={max(1, args.steps // _REPORTS)}"]
        settings += [f"trainer.accelerator={'cpu' if args.device == 'cpu' else 'gpu'}"]
        settings += [f"trainer.precision={'bf16-mixed' if args.precision == 'bf16' else '32'}", *args.overrides]
        _run([sys.executable, "-m", "clip_train.commands.train", *settings])
        with (Path(folder) / "run" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/samples_per_second"]]
    later = rows[len(rows) // 2 :]
    rate, wait = ([float(row[f"train/{key}"]) for row in later] for key in ("samples_per_second", "data_wait_fraction"))
    return statistics.median(rate), statistics.median(wait)


def _open_clip(args: argparse.Namespace) -> float:
    """Pairs per second."""
    with TemporaryDirectory() as folder:
        data = {"train-data": "::".join(expand_shards(args.shards, "--shards")), "dataset-type": "webdataset"}
        said = _run(open_clip_command(str(args.open_clip), args, args.steps, args.workers, folder, data))
    rates = [float(rate) for rate in _RATE.findall(said)]
    if len(rates) < 2:
        raise RuntimeError("it reported no steps")
    return statistics.median(rates[len(rates) // 2 :])


def _run(command: list[str]) -> str:
    """What the command says. Raises RuntimeError, with its last complaint, if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        complaints = re.findall(r"^\w*(?:Error|error)\b.*", done.stdout, re.MULTILINE)
        raise RuntimeError(complaints[-1] if complaints else f"exit code {done.returncode}")
    return done.stdout


def _arguments() -> argparse.Namespace:
    shards = str(SMALL_PHOTOS) if SMALL_PHOTOS.parent.exists() else unpack_demo("demo:emoji/train") + "/*.tar"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b_32", choices=OPEN_CLIP_NAMES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], help="bf16 where the device multiplies in it, else 32")
    parser.add_argument("--shards", default=shards, metavar="PATTERN", help="of pictures and txt files")
    parser.add_argument("--open-clip", type=Path, default=_OTHER_PYTHON if _OTHER_PYTHON.exists() else sys.executable)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where end_to_end.md is, or will be")
    parser.add_argument("overrides", nargs="*", help="further settings of ours, such as trainer.compile=true")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    return args


if __name__ == "__main__":
    main()
