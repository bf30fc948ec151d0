"""Training from shards on a disk, loader included, beside open_clip's own program on the same shards, in one run.

    uv run python scripts/bench/end_to_end.py --out docs/benchmarks
    uv run python scripts/bench/end_to_end.py --device cuda --model vit_b_32 --batch 1024 --steps 60 --workers 16

Both programs run for some steps; the rate is the median of the second half of them. Ours says how much of the time it
waited for data. open_clip reads shards with webdataset before 1.0 only: --open-clip names the Python of an environment
that has it, such as `loader.py` makes.
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from loader_shards import SMALL_PHOTOS
from measure import describe_machine, markdown_table, multiplies_bf16
from open_clip_program import open_clip_command
from step_contenders import OPEN_CLIP_NAMES

from clip_train.data.demo import unpack_demo
from clip_train.data.files import write_atomic
from clip_train.data.shards import expand_shards

_OTHER_PYTHON = Path("runs/bench/loader/env-open_clip/bin/python")
_RATE = re.compile(r"Train Epoch: 0 .* ([\d.]+)/s, ")
_HEADER = ("model", "batch", "workers", "ours pairs/s", "of it waiting", "open_clip pairs/s", "ours / open_clip")


def main() -> None:
    args = _arguments()
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    machine += f"- device: {args.device}, precision: {args.precision}, rounds: {args.rounds}, steps: {args.steps}\n"
    print(machine, flush=True)
    rates, waits, theirs, reason = [], [], [], ""
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        rate, wait = _ours(args)
        rates, waits = [*rates, rate], [*waits, wait]
        try:
            theirs.append(_open_clip(args))
        except RuntimeError as error:
            reason = f"\nopen_clip was not measured: {error}\n"
    figures = [f"{statistics.median(rates):.1f}", f"{statistics.median(waits):.0%}", "", ""]
    if len(theirs) == len(rates):
        ratio = statistics.median(a / b for a, b in zip(rates, theirs))
        figures[2:] = [f"{statistics.median(theirs):.1f}", f"{ratio:.2f}"]
    table = markdown_table(_HEADER, [[args.model, str(args.batch), str(args.workers), *figures]])
    report = f"{machine}\n{table}{reason}"
    print(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "end_to_end.md", report.encode())


def _ours(args: argparse.Namespace) -> tuple[float, float]:
    """Pairs per second, and the share of the time spent waiting for data."""
    with TemporaryDirectory() as folder:
        settings = [f"model={args.model}", f"batch_size={args.batch}", f"max_steps={args.steps}", "run_name=run"]
        settings += [f"output_dir={folder}", f"data.train.shards='{args.shards}'", "data.caption_key=txt"]
        settings += [f"data.num_workers={args.workers}", "data.val.shards=null", "eval.every=null", "eval.report=false"]
        settings += ["trainer.log_every=1", f"trainer.accelerator={'cpu' if args.device == 'cpu' else 'gpu'}"]
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
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write end_to_end.md")
    parser.add_argument("overrides", nargs="*", help="further settings of ours, such as trainer.compile=true")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    return args


if __name__ == "__main__":
    main()
