"""A run that is disturbed at random moments, against the same run left alone.

    uv run python scripts/chaos.py --ranks 2 --disturbances 30 --out docs/benchmarks/chaos.md

Each disturbance ends the run, or hurts it, in one of five ways; then it is started again with resume=auto, as a
scheduler would. In the end no sample may be lost or taken twice, and weights, optimizer and losses must equal the other
run's to the bit. The disk is a small tmpfs where mounting is allowed (root); elsewhere it is never full.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from clip_train.checkpoints.folder import list_checkpoints, verify
from clip_train.data.files import write_atomic
from clip_train.training.callbacks.sample_log import read_sample_log
from clip_train.training.loggers.csv_logger import read_metrics

MODEL = (
    "model=vit_tiny",
    "model.image_size=32",
    "model.vision.options={patch_size: 16, embed_dim: 64, depth: 2, num_heads: 2}",
    "model.text={width: 64, layers: 2, heads: 2, context_length: 16}",
)
SETTINGS = (
    "batch_size=24",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.log_every=1",
    "data.val.shards=null",
    "data.num_workers=0",
    "data.sample_log=true",
    "checkpoint.every=2",
    "checkpoint.keep=3",
    "guard.timeout=120",
    "resume=auto",
)
DISK_MEGABYTES = 400
EXIT_USER_ERROR = 2
HANG_SECONDS = 600


class Run:
    """A run of several ranks in its own process group, which can be started again and again."""

    def __init__(self, folder: Path, ranks: int, steps: int, output: Path) -> None:
        self.folder, self.output = folder, output
        self.command = [sys.executable, "-m", "clip_train.commands.train", *MODEL, *SETTINGS, f"max_steps={steps}"]
        self.command += [f"trainer.devices={ranks}", f"output_dir={folder.parent}", f"run_name={folder.name}"]
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        return self.process

    def wait(self) -> int:
        """The exit code, once all ranks are gone.

        Raises:
            TimeoutError: a rank hangs.
        """
        assert self.process
        code = self.process.wait(HANG_SECONDS)
        end = time.monotonic() + HANG_SECONDS
        while self.ranks():
            if time.monotonic() > end:
                raise TimeoutError(f"ranks {self.ranks()} are still there")
            time.sleep(0.1)
        return code

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live: the first, and those it started."""
        assert self.process
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append(int(status.parent.name))
        return sorted(found)

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def has_made_progress(self, since: float) -> bool:
        return any(path.stat().st_mtime > since for path in self.folder.glob("samples/*.csv"))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def kill_a_rank(run: Run, chance: random.Random) -> None:
    run.kill([chance.choice(run.ranks())])


def terminate(run: Run, chance: random.Random) -> None:
    assert run.process
    run.process.send_signal(chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]))


def kill_during_a_save(run: Run, chance: random.Random) -> None:
    wait_for(lambda: list(run.checkpoints.glob("*.tmp")), run)
    run.kill(run.ranks())


def fill_the_disk(run: Run, chance: random.Random) -> None:
    filler = run.folder.parent / "filler"
    try:
        with open(filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
    except OSError:
        pass
    time.sleep(chance.uniform(1, 4))
    filler.unlink()
    time.sleep(chance.uniform(0, 2))
    run.kill(run.ranks())


def corrupt_the_newest(run: Run, chance: random.Random) -> None:
    run.kill(run.ranks())
    files = [path for path in list_checkpoints(run.checkpoints)[-1].iterdir() if path.stat().st_size]
    path = chance.choice(files)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)


def wait_for(condition: Callable[[], object], run: Run) -> None:
    assert run.process
    end = time.monotonic() + HANG_SECONDS
    while run.process.poll() is None and not condition():
        if time.monotonic() > end:
            raise TimeoutError("nothing happens")
        time.sleep(0.002)


DISTURBANCES = {
    "SIGKILL of a rank": kill_a_rank,
    "SIGTERM, SIGUSR1 or SIGINT": terminate,
    "SIGKILL of all during a save": kill_during_a_save,
    "full disk, then SIGKILL of all": fill_the_disk,
    "SIGKILL of all, newest checkpoint corrupted": corrupt_the_newest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--disturbances", type=int, default=30, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="length of the run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the report")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(disk)]
    is_small = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    output = folder / "output.log"
    try:
        alone = Run(folder / "alone", args.ranks, args.steps, output)
        alone.start()
        if code := alone.wait():
            raise RuntimeError(f"the undisturbed run ended with {code}: {output.read_text()[-2000:]}")
        disturbed = Run(disk / "disturbed", args.ranks, args.steps, output)
        counts, restarts = disturb(disturbed, args.disturbances, random.Random(args.seed), is_small)
        report = compare(alone, disturbed, counts, restarts, args)
    finally:
        if is_small:
            subprocess.run(["umount", "-l", str(disk)], check=False)
        shutil.rmtree(folder)
    print(report)
    if args.out:
        write_atomic(args.out, report.encode())


def disturb(run: Run, count: int, chance: random.Random, is_small: bool) -> tuple[Counter[str], int]:
    """Disturb a run until it has been disturbed so often, then let it end; how often of each kind, and the restarts."""
    kinds = [kind for kind in DISTURBANCES if is_small or "disk" not in kind]
    counts: Counter[str] = Counter()
    restarts = -1
    while True:
        process, started = run.start(), time.time()
        restarts += 1
        if counts.total() < count:
            kind = kinds[counts.total() % len(kinds)]
            wait_for(lambda: run.has_made_progress(started), run)  # noqa: B023 (called at once)
            time.sleep(chance.uniform(0, 1.5))
            if process.poll() is None:
                DISTURBANCES[kind](run, chance)
                counts[kind] += 1
                print(f"{counts.total()}: {kind}, at {len(list_checkpoints(run.checkpoints))} checkpoints", flush=True)
        code = run.wait()
        if code == 0:
            return counts, restarts
        if code == EXIT_USER_ERROR:
            raise RuntimeError(f"the run refuses to go on: {run.output.read_text()[-2000:]}")


def compare(alone: Run, disturbed: Run, counts: Counter[str], restarts: int, args: argparse.Namespace) -> str:
    """The report.

    Raises:
        RuntimeError: the runs differ.
    """
    expected, found = (Counter(samples(run)) for run in (alone, disturbed))
    lost, repeated = (expected - found).total(), (found - expected).total()
    files = [verify(list_checkpoints(run.checkpoints)[-1]).files for run in (alone, disturbed)]
    same = {name: files[0][name] == files[1][name] for name in ("model.safetensors", "optimizer.safetensors")}
    rows = [
        [(row["samples_seen"], row["train/loss"]) for row in read_metrics(run.folder / "metrics.csv")[1]]
        for run in (alone, disturbed)
    ]
    lines = [
        f"{args.ranks} ranks (gloo), {args.steps} steps of 24 pairs, a checkpoint every 2 steps, seed {args.seed}",
        "",
        "| disturbance | times |",
        "|---|---:|",
        *(f"| {kind} | {number} |" for kind, number in counts.items()),
        f"| **all** | {counts.total()} |",
        "",
        "| outcome | |",
        "|---|---:|",
        f"| restarts | {restarts} |",
        f"| samples of the undisturbed run | {expected.total()} |",
        f"| samples lost | {lost} |",
        f"| samples repeated | {repeated} |",
        f"| weights equal to the bit | {'yes' if same['model.safetensors'] else 'NO'} |",
        f"| optimizer equal to the bit | {'yes' if same['optimizer.safetensors'] else 'NO'} |",
        f"| losses of all steps equal | {'yes' if rows[0] == rows[1] else 'NO'} |",
    ]
    report = "\n".join(lines) + "\n"
    if lost or repeated or not all(same.values()) or rows[0] != rows[1]:
        raise RuntimeError(f"the runs differ\n{report}")
    return report


def samples(run: Run) -> list[tuple[int, str]]:
    """(samples seen, name) of every sample that a step of the run's effective history took."""
    return [(seen, name) for seen, names in read_sample_log(run.folder / "samples").items() for name in names]


if __name__ == "__main__":
    main()
