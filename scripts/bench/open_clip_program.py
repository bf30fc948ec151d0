"""open_clip's own training program, as a user starts it."""

import argparse
from collections.abc import Mapping

from step_contenders import OPEN_CLIP_NAMES


def open_clip_command(
    python: str, args: argparse.Namespace, steps: int, workers: int, folder: str, data: Mapping[str, str]
) -> list[str]:
    """The command line for an epoch of so many steps, each of which is reported.

    Args:
        python: of the environment that has open_clip.
        args: `model`, `batch`, `precision` and `device`.
        folder: for its logs.
        data: the options that say what it reads.
    """
    options = {
        **data,
        "train-num-samples": str(steps * args.batch),
        "batch-size": str(args.batch),
        "workers": str(workers),
        "epochs": "1",
        "model": OPEN_CLIP_NAMES[args.model],
        "precision": "amp_bf16" if args.precision == "bf16" else "fp32",
        "device": args.device,
        "log-every-n-steps": "1",
        "logs": folder,
    }
    return [python, "-m", "open_clip_train.main", *(word for key in options for word in (f"--{key}", options[key]))]
