"""How long a save holds up training: ours, torch.save, Lightning's and torch's asynchronous ones.

    uv run python scripts/bench/checkpoint.py --model vit_b_32 --out docs/benchmarks/checkpoint.md

Each contender saves the same weights and AdamW state some times into a fresh folder. Meanwhile a loop of matrix
products stands for training: `stall` is how long the call keeps it waiting, `speed` what it reaches, of its speed when
nothing is saved, until the files are complete. What ours writes also has checksums and is forced to the disk (fsync).
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from measure import describe_machine
from record import markdown_table

from clip_train.checkpoints.retention import Retention
from clip_train.checkpoints.snapshot import SnapshotTaker
from clip_train.checkpoints.writer import CheckpointWriter
from clip_train.commands.program import config_dir
from clip_train.data.files import write_atomic

NOTES = """
`stall` is how long the call keeps training waiting; the files are complete later. Medians over saves made in turn. What
ours writes also has checksums and is forced to the disk. The first asynchronous save of a run takes the memory for its
copy; later ones use it again. A loop of matrix products on one core stands for training.
"""

Save = Callable[[dict, Path], Callable[[], None]]  # begins a save; what it returns waits until the files are complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b_32", help="config of the model (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="saves per contender (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (a temporary folder)")
    parser.add_argument("--out", type=Path, help="where to write the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    state = make_state(args.model)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_", dir=args.folder))
    try:
        table = measure_all(state, folder, args.rounds)
    finally:
        shutil.rmtree(folder)
        dist.destroy_process_group()
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine().items())
    saved = f"- model: {args.model}, {size(state) / 1e9:.2f} GB of weights and AdamW state\n"
    report = f"{machine}{saved}\n{table}{NOTES}"
    print(report)
    if args.out:
        write_atomic(args.out, report.encode())


def make_state(model_name: str) -> dict:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from clip_train.models import create_dual_encoder

    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"model={model_name}", "data=emoji"])
    model = create_dual_encoder(**OmegaConf.to_container(cfg.model, resolve=True))  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"samples_seen": 0, "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}


def size(state: dict) -> int:
    moments = [tensor for values in state["optimizer_states"][0]["state"].values() for tensor in values.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*state["state_dict"].values(), *moments])


def contenders() -> dict[str, Save]:
    taker = SnapshotTaker(copy=True)
    lightning = AsyncCheckpointIO(TorchCheckpointIO())

    def ours(state: dict, path: Path) -> Callable[[], None]:
        writer = CheckpointWriter(path, Retention(1))
        writer.write(taker.take(state, rank=0), {})
        return writer.wait

    def ours_first(state: dict, path: Path) -> Callable[[], None]:
        writer = CheckpointWriter(path, Retention(1))
        writer.write(SnapshotTaker(copy=True).take(state, rank=0), {})
        return writer.wait

    def ours_synchronous(state: dict, path: Path) -> Callable[[], None]:
        writer = CheckpointWriter(path, Retention(1))
        writer.write(SnapshotTaker(copy=False).take(state, rank=0), {})
        writer.wait()
        return nothing

    def torch_save(state: dict, path: Path) -> Callable[[], None]:
        torch.save(state, path)
        return nothing

    def lightning_asynchronous(state: dict, path: Path) -> Callable[[], None]:
        lightning.save_checkpoint(state, path)
        return lambda: wait_for_lightning(lightning)

    def dcp_asynchronous(state: dict, path: Path) -> Callable[[], None]:
        future = dcp.async_save(state, checkpoint_id=str(path))
        return lambda: future.result()  # pyright: ignore[reportAttributeAccessIssue]

    return {
        "ours, asynchronous": ours,
        "ours, asynchronous, the first of a run": ours_first,
        "ours, synchronous": ours_synchronous,
        "torch.save": torch_save,
        "Lightning AsyncCheckpointIO": lightning_asynchronous,
        "torch DCP async_save": dcp_asynchronous,
    }


def nothing() -> None:
    pass


def wait_for_lightning(plugin: AsyncCheckpointIO) -> None:
    """Its executor is the only way to learn that it has written."""
    assert plugin._executor
    plugin._executor.submit(nothing).result()


def measure_all(state: dict, folder: Path, rounds: int) -> str:
    saves = contenders()
    saves["ours, asynchronous"](state, folder / "warm")()
    stalls: dict[str, list[float]] = {name: [] for name in saves}
    totals: dict[str, list[float]] = {name: [] for name in saves}
    speeds: dict[str, list[float]] = {name: [] for name in saves}
    for _ in range(rounds):
        for name, save in saves.items():
            alone = products_per_second(lambda start: time.perf_counter() - start > 1)
            path = folder / "checkpoint"
            start = time.perf_counter()
            wait = save(state, path)
            stalls[name].append(time.perf_counter() - start)
            speeds[name].append(speed_until(wait) / alone)
            totals[name].append(time.perf_counter() - start)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()
    rows = [
        [name, f"{median(stalls[name]):.2f}", f"{median(totals[name]):.2f}", f"{median(speeds[name]):.2f}"]
        for name in saves
    ]
    return markdown_table(["save", "stall s", "complete after s", "speed of training meanwhile"], rows)


def speed_until(wait: Callable[[], None]) -> float:
    """Matrix products per second while another thread waits."""
    from threading import Thread

    thread = Thread(target=wait)
    thread.start()
    return products_per_second(lambda start: not thread.is_alive())


def products_per_second(done: Callable[[float], bool]) -> float:
    matrix, count, start = torch.randn(256, 256), 0, time.perf_counter()
    while True:
        torch.mm(matrix, matrix)
        count += 1
        if count >= 10 and done(start):
            return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
