"""Pictures and captions per second of `clip-embed`, beside open_clip's and transformers' own towers and preparation.

    uv run python scripts/bench/encode.py --out docs/benchmarks
    uv run python scripts/bench/encode.py --shards '/data/cc12m/{00000..00009}.tar' --device cuda --precision bf16

The same weights in each library's own layout, the same shards, from the bytes of a JPEG, or a caption, to a unit
vector. Each measurement runs in a fresh process, of one thread on a CPU. A round runs every contender once. Without
--shards the pictures are mosaics of small real photos, 500 x 375.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encode_contenders import FOLDERS, IMAGE, OPEN_CLIP, OURS, TEXT, Job, Sample, measure_encoding
from loader_shards import built_sets
from measure import describe_machine, run_ranks
from record import markdown_table
from safetensors.torch import save_file
from step_contenders import model_config

from clip_train.data.files import write_atomic
from clip_train.data.shards import expand_shards
from clip_train.interop.exporting import export
from clip_train.models import create_dual_encoder

NOTES = """
From the shard to unit vectors, loading included. `ours` is `clip-embed`, which writes files as well; the others collect
vectors in memory, from a DataLoader over webdataset, their own preparation and their own towers. Ratios are to the
first row of open_clip; compiling is not in the time. `difference` is the largest of a coordinate of the first eight
vectors, from open_clip's.

Texts are encoded at the length that they have, in groups (`model.text.length_multiple`); open_clip encodes 77 tokens of
each, transformers the longest of the batch.
"""


def main() -> None:
    args = _arguments()
    pattern = args.shards or str(built_sets(args.work)[0].folder / "*.tar")
    shards = expand_shards(pattern, "--shards")[: args.num_shards]
    config = model_config(args.model)
    models = write_models(args.work / "models" / args.model, config)
    how = (models, config, shards, args.device, args.precision)
    jobs = {
        (side, contender, compiled): Job(contender, side, *how, compiled, args.batch_size, args.workers)
        for side in (IMAGE, TEXT)
        for contender in FOLDERS
        for compiled in args.compile
    }
    samples: dict[Any, list[Sample]] = {key: [] for key in jobs}
    for turn in range(args.rounds):
        for key, job in jobs.items():
            samples[key] += run_ranks(measure_encoding, 1, job, args.warm_up)
            print(f"round {turn + 1}: {key}: {samples[key][-1].per_second:.1f} a second", flush=True)
    machine = describe_machine(["torch", "open-clip-torch", "transformers", "timm"])
    machine["device"] = device_name(args.device)
    described = "".join(f"- {key}: {value}\n" for key, value in machine.items())
    about = f"{args.model}, batches of {args.batch_size}, precision {args.precision}, {args.workers} loader processes"
    report = f"{described}- {about}, the median of {args.rounds} rounds\n\n{table(samples)}{NOTES}"
    print(report)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "encode.md", report.encode())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="PATTERN", help="measure on these (jpg and txt) instead")
    parser.add_argument("--num-shards", type=int, default=2, help="of them, the first (%(default)s)")
    parser.add_argument("--model", default="vit_b_32", help="one of configs/model (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--compile", type=_switches, default=(False,), metavar="off,on", help="(off)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="loader processes (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="batches that do not count (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per contender (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench/loader"), help="pictures and models go here")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write encode.md")
    args = parser.parse_args()
    args.work = args.work.absolute()
    return args


def _switches(text: str) -> tuple[bool, ...]:
    return tuple({"off": False, "on": True}[word] for word in text.split(","))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "one thread of the processor"


def write_models(folder: Path, config: dict[str, Any]) -> Path:
    """A model with random weights, in the layout of each library."""
    weights = folder / FOLDERS[OURS]
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        save_file(create_dual_encoder(**config).state_dict(), weights)
    for format in (name for name in FOLDERS.values() if name != weights.name and not (folder / name).exists()):
        export(str(weights), folder / format, format, config)
    return folder


def table(samples: Mapping[Any, Sequence[Sample]]) -> str:
    rates = {key: statistics.median(sample.per_second for sample in of_one) for key, of_one in samples.items()}
    rows = []
    for (side, contender, compiled), of_one in samples.items():
        base = next(key for key in samples if key[0] == side and key[1] == OPEN_CLIP)
        rate, difference = rates[side, contender, compiled], np.abs(of_one[0].first - samples[base][0].first).max()
        ratio = f"{rate / rates[base]:.2f}"
        rows.append([f"{side}s", contender, "yes" if compiled else "no", f"{rate:.1f}", ratio, f"{difference:.0e}"])
    return markdown_table(["", "contender", "compiled", "per second", "ratio", "difference"], rows)


if __name__ == "__main__":
    main()
