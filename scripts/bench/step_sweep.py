"""Our training step by batch and setting on one device: its rate, its share of what the device multiplies, its memory.

    python scripts/bench/step_sweep.py
    python scripts/bench/step_sweep.py --device cpu --models vit_b_32 --batch 8 --settings "open_clip;plain"

A step is that of `step.py`, on a batch that is on the device. `% of peak` is model FLOPs utilisation, with the rate of
products of large square matrices, measured in the same run, as the peak, and of texts only their own tokens counted:
open_clip computes padding too, which is not counted for it either. Memory is what the step needs above weights,
optimizer state and the batch. Each measurement is a fresh process; figures are medians over rounds of them.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from captions import find_captions
from measure import describe_machine, multiplies_bf16, run_ranks
from record import markdown_table
from step_contenders import OPEN_CLIP_NAMES, Sample, StepJob, measure_step, model_config
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from clip_train.data.tokenizer import ClipTokenizer
from clip_train.planning.hardware import Hardware, measure_hardware
from clip_train.training.instruments.utilisation import count_pair_flops

_OURS, _CACHED, _THEIRS = "ours, whole batch", "ours, cached", "open_clip, whole batch"
SETTINGS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "open_clip": (_THEIRS, {}),
    "plain": (_OURS, {}),
    "compile": (_OURS, {"compile": "default"}),
    "cuda graphs": (_OURS, {"compile": "reduce-overhead"}),
    "selective": (_OURS, {"checkpointing": "selective"}),
    "blocks": (_OURS, {"checkpointing": "blocks"}),
    "selective, compile": (_OURS, {"checkpointing": "selective", "compile": "default"}),
    "float8, compile": (_OURS, {"float8": True, "compile": "default"}),
    "4 micro-batches": (_CACHED, {}),
}
_HEADER = ("model", "batch", "setting", "ms", "pairs/s", "% of peak", "memory, GiB", "time / open_clip's")
_PACKAGES = ("torch", "timm", "transformers", "torchao", "triton", "open-clip-torch")


def main() -> None:
    args = _arguments()
    captions = find_captions(max(args.batch), args.shards)
    (hardware,) = run_ranks(_rates, 1, args.device)
    rate = hardware.rate("bf16-mixed" if args.precision == "bf16" else "32")
    machine = "".join(f"- {key}: {value}\n" for key, value in describe_machine(_PACKAGES).items())
    machine += f"- device: {hardware.name}, {rate / 1e12:.1f} TFLOP/s in products of square matrices\n"
    machine += f"- precision: {args.precision}, rounds: {args.rounds}, steps: {args.steps}\n"
    machine += f"- captions: {captions.source}, {captions.words():.1f} words on average\n"
    print(f"{machine}\n{markdown_table(_HEADER, [])}", end="", flush=True)
    for model in args.models:
        for batch in args.batch:
            flops, theirs = _flops(model, batch, captions.texts), None
            for name in args.settings:
                samples = _samples(args, name, model, batch, captions.texts)
                if isinstance(samples, str):
                    cells = [f"{name}: {samples}", *[""] * 5]
                else:
                    seconds = statistics.median(sample.seconds for sample in samples)
                    theirs = seconds if name == "open_clip" else theirs
                    memory = statistics.median(sample.memory for sample in samples) / 2**30
                    cells = [name, f"{1e3 * seconds:.1f}", f"{batch / seconds:.1f}", f"{flops / seconds / rate:.1%}"]
                    cells += [f"{memory:.2f}", f"{seconds / theirs:.2f}" if theirs else ""]
                print(f"| {' | '.join([model, str(batch), *cells])} |", flush=True)


def _rates(device: str) -> Hardware:
    return measure_hardware(torch.device(device))


def _samples(
    args: argparse.Namespace, setting: str, model: str, batch: int, captions: Sequence[str]
) -> list[Sample] | str:
    """One for each round; or why there are none."""
    contender, settings = SETTINGS[setting]
    how = {"device": args.device, "precision": args.precision, "steps": args.steps, **settings}
    job = StepJob(contender, model, batch, max(1, batch // 4), captions, **how)
    samples = []
    for number in range(args.rounds):
        print(f"{model}, batch {batch}, round {number + 1}: {setting}", file=sys.stderr, flush=True)
        try:
            samples += run_ranks(measure_step, 1, job)
        except (ProcessRaisedException, ProcessExitedException) as error:
            reason = str(error).strip().splitlines()[-1].replace("|", "/")
            return "out of memory" if "OutOfMemory" in str(error) else reason
    return samples


def _flops(model: str, batch: int, captions: Sequence[str]) -> float:
    """That the batch of `step_contenders.py` needs."""
    config = model_config(model)
    texts = ClipTokenizer(config["text"]["context_length"])([captions[n % len(captions)] for n in range(batch)])
    return count_pair_flops(config, None).of(batch, texts.argmax(axis=1) + 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_words, default=["vit_b_32", "vit_b_16", "vit_l_14"], help="by commas")
    parser.add_argument("--batch", type=_numbers, default=[256, 1024], help="pairs per step, by commas (256,1024)")
    parser.add_argument(
        "--settings", type=_settings, default=list(SETTINGS), help="by semicolons, of those in the file"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["32", "bf16"], help="bf16 where the device multiplies in it, else 32")
    parser.add_argument("--shards", metavar="PATTERN", help="take the captions of these (txt)")
    parser.add_argument("--rounds", type=int, default=1, help="fresh processes per setting (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per process (%(default)s)")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA GPU; --device cpu measures the processor")
    if unknown := set(args.models) - set(OPEN_CLIP_NAMES):
        parser.error(f"--models: {', '.join(sorted(unknown))} is none of {', '.join(OPEN_CLIP_NAMES)}")
    if unknown := set(args.settings) - set(SETTINGS):
        parser.error(f"--settings: {'; '.join(sorted(unknown))} is none of {'; '.join(SETTINGS)}")
    args.precision = args.precision or ("bf16" if args.device != "cpu" or multiplies_bf16() else "32")
    args.settings.sort(key=list(SETTINGS).index)  # open_clip, which others are divided by, first
    return args


def _words(text: str) -> list[str]:
    return text.split(",")


def _settings(text: str) -> list[str]:
    return text.split(";")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
