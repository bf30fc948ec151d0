"""Images per second and core of our loader, open_clip's, others, and of decoding alone, side by side.

    uv run python scripts/bench/loader.py --out runs/bench
    uv run python scripts/bench/loader.py --shards '/data/cc12m/{00000..00003}.tar' --rounds 5

Without --shards the pictures are two sets of mosaics, 500 x 375 and 1365 x 1024, made once from small real photos.
Each measurement runs in a fresh process of one thread, bound to one core. A round runs every contender once, so that
whatever else the machine does meets all alike. Contenders that need other packages than the project's get an
environment of their own under --work, made by uv.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import loader_contenders
from loader_contenders import CONTENDERS, Contender
from loader_report import NOTES, Result, report
from loader_shards import PictureSet, built_sets, first_of
from measure import describe_machine

from clip_train.data.files import write_atomic
from clip_train.errors import DataError

_DESCRIBED = ("torch", "torchvision", "pillow", "simplejpeg", "open-clip-torch")
_SAME_EVERYWHERE = ("torch", "torchvision", "pillow", "open-clip-torch")
_LONGEST_S = 300


def main() -> None:
    args = _arguments()
    try:
        sets = [first_of(args.shards, args.work)] if args.shards else built_sets(args.work)
    except DataError as error:
        sys.exit(str(error))
    described = {**describe_machine(_DESCRIBED), "other work": f"{os.getloadavg()[0]:.1f} processes in the last minute"}
    machine = "".join(f"- {key}: {value}\n" for key, value in described.items())
    print(machine)
    sections = []
    for pictures in sets:
        sections.append(report(pictures, _measured(pictures, args)))
        print(sections[-1], flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write_atomic(args.out / "loader.md", "\n".join([machine, *sections, NOTES.lstrip()]).encode())
    print(NOTES)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="PATTERN", help="measure on the first JPEGs of these (jpg and txt) instead")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each, or one pass if it is longer (%(default)s)")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="where they run (%(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(CONTENDERS), metavar="NAME;NAME")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench/loader"), help="pictures and environments go here"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write loader.md")
    args = parser.parse_args()
    args.work = args.work.absolute()
    if unknown := set(args.only) - set(CONTENDERS):
        parser.error(f"--only: no contender {', '.join(unknown)}; there are {'; '.join(CONTENDERS)}")
    return args


def _measured(pictures: PictureSet, args: argparse.Namespace) -> dict[str, Result]:
    """All contenders on one set, round by round. One that fails is not run again; ours may not."""
    results = {name: Result() for name in args.only}
    for turn in range(args.rounds):
        for name, result in results.items():
            if result.not_run:
                continue
            print(f"{pictures.folder.name}, round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                python = _environment(name, CONTENDERS[name], args.work)
                result.rounds.append(_sample(python, name, pictures.folder, args))
            except RuntimeError as error:
                if name.startswith("our"):
                    raise
                result.rounds, result.not_run = [], str(error)
    return results


def _environment(name: str, contender: Contender, work: Path) -> str:
    """The Python that has the contender's packages; the rest of its environment is as in the project's.

    Raises RuntimeError if they cannot be had.
    """
    if not contender.packages:
        return sys.executable
    folder = work / f"env-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        try:
            same = [f"{package}=={version(package)}" for package in _SAME_EVERYWHERE]
        except PackageNotFoundError as error:
            raise RuntimeError(f"there is no {error.name} here") from error
        _output(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], work)
        install = ["uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
        _output([*install, *same, *contender.packages], work)
        (folder / "complete").touch()
    return str(python)


def _sample(python: str, name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    options = ["--core", str(args.core), "--seconds", str(args.seconds)]
    return json.loads(_output([python, loader_contenders.__file__, name, str(folder), *options], args.work))


def _output(command: list[str], work: Path) -> str:
    """The last line that the command prints. Raises RuntimeError with the last line of its complaint if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=_LONGEST_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return (done.stdout.strip() or "null").splitlines()[-1]


if __name__ == "__main__":
    main()
