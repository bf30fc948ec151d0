"""clip-embed: embeddings of pictures and texts, for search and all else."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from clip_train.commands.program import EXIT_DONE, EXIT_RESUMABLE, run_program
from clip_train.training.signals import STOP_SIGNALS, ignore_signals

if TYPE_CHECKING:  # imports stay inside the functions: see program.py
    from clip_train.embedding.embed import Progress, Tally

_SECONDS_BETWEEN_LINES = 10


def main() -> None:
    """Entry point."""
    with _resumable():
        run_program("clip-embed", "embed", _embed, short={"data": "data.path"})


@contextmanager
def _resumable() -> Iterator[None]:
    """A signal ends the program at once: parts are whole or not there, and a new start goes on with the next."""

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except KeyboardInterrupt as signalled:
        ignore_signals()
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"clip-embed: {signalled}: what is complete is kept; start it again to go on", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_RESUMABLE)  # else it would wait for loader workers, and those for their downloads
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _embed(cfg: DictConfig) -> int:
    from clip_train.distributed import agreed, group_rank
    from clip_train.embedding.embed import describe_weights, embed
    from clip_train.embedding.options import EmbedOptions
    from clip_train.errors import ConfigError
    from clip_train.evaluation.loaded_model import load_model
    from clip_train.interop.joining import WeightSource
    from clip_train.interop.model_source import open_model
    from clip_train.shard_tools.access import ShardAccess
    from clip_train.training.launch import find_world, join_ranks, num_workers
    from clip_train.typed_config import typed

    for key, value in (("weights", cfg.weights), ("data", cfg.data.path), ("output", cfg.output)):
        if value is None:
            raise ConfigError(f"{key} has no value: give {key}=...")
    options = typed(EmbedOptions, OmegaConf.create({**cfg, **cfg.data, "data": cfg.data.path}))
    access = typed(ShardAccess, cfg.data, "data")
    world = find_world(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.num_nodes)
    workers = num_workers(cfg.data.num_workers, world, "data.num_workers")
    weights = {"weights": str(cfg.weights), "ema": bool(cfg.ema), "base": cfg.base and str(cfg.base)}
    model = OmegaConf.to_container(cfg.model, resolve=True) if "model" in cfg else None
    device = join_ranks(world)
    with agreed():
        source = open_model(WeightSource(**weights), model)  # pyright: ignore[reportArgumentType]
        described = describe_weights(source, weights)
        loaded = load_model(
            source,
            device,
            precision=options.precision,
            compile=options.compile,
            batch_size=options.batch_size,
            num_workers=workers,
        )
    with _progress(shown=group_rank() == 0) as show:
        tally = embed(loaded, described, options, access, show)
    if group_rank() == 0:
        _print(tally, options.output)
    return EXIT_DONE


def _print(tally: "Tally", output: str) -> None:
    from clip_train.embedding.embed import SKIPPED

    there = tally.samples - tally.new
    already = f", {there:,} were there" if there else ""
    speed = f" in {tally.seconds:.1f} s ({tally.new / tally.seconds:,.0f} samples/s)" if tally.new else ""
    print(f"{tally.samples:,} samples in {tally.parts} parts in {output}: embedded {tally.new:,}{speed}{already}")
    if tally.bad:
        print(f"left out {len(tally.bad):,} that cannot be used, all listed in {output}/{SKIPPED}")


@contextmanager
def _progress(shown: bool) -> "Iterator[Callable[[Progress], None]]":
    """A bar on a terminal, and a line every few seconds elsewhere; of the first rank."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("parts"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    printed = time.monotonic()
    with Bar(*columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=None)

        def show(progress: "Progress") -> None:
            nonlocal printed
            speed = progress.samples / max(progress.seconds, 1e-9)
            line = f"{progress.samples:,} samples, {speed:,.0f} samples/s"
            bar.update(task, completed=progress.parts, total=progress.of_parts, description=line)
            if shown and not console.is_terminal and time.monotonic() > printed + _SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                print(f"{progress.parts} of {progress.of_parts} parts, {line}", flush=True)

        yield show


if __name__ == "__main__":
    main()
