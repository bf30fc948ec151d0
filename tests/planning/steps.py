"""Real models, steps and their peak memory, for what is planned to be held against."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from clip_train.distributed import group_size
from clip_train.losses import contrastive_loss
from clip_train.models import DualEncoder, create_dual_encoder
from clip_train.models.activation_checkpointing import NONE
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.fsdp import average_gradients, shard_towers
from clip_train.training.optim.optimizer import build_optimizer
from scripts.bench.measure import PeakMemory
from tests.cli.warm_start import context

_M_MMAP_THRESHOLD = -3
TEXT = {"width": 128, "layers": 4, "heads": 2, "context_length": 32, "vocab_size": 1000, "length_multiple": None}
VIT = {
    "embed_dim": 64,
    "image_size": 64,
    "vision": {
        "name": "vit_tiny_patch16_224",
        "options": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 2},
    },
    "text": TEXT,
}
SIGLIP = {
    **VIT,
    "vision": {
        "name": "vit_base_patch16_siglip_224",
        "options": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2},
        "proj": "none",
    },
    "embed_dim": 128,
    "text": {**TEXT, "name": "siglip", "tokenizer": "any", "proj": "none", "context_length": 64},
}
# Almost all of whose weights are in a few blocks.
WIDE = {
    **VIT,
    "vision": {
        "name": "vit_tiny_patch16_224",
        "options": {"patch_size": 32, "embed_dim": 768, "depth": 4, "num_heads": 4},
    },
}
# Of whose weights and gradients there is as much as of activations.
WORDY = {**VIT, "text": {**TEXT, "vocab_size": 100_000}}
CONVNET = {**VIT, "vision": {"name": "convnext_atto"}, "image_size": 96}


def peak_of_step(
    config: dict, pairs: int, checkpointing: str = NONE, at_once: int | None = None, precision: str = "32"
) -> int:
    """Bytes that a forward, loss and backward in a fresh process take above the model, in micro-batches if so said."""
    return _in_fresh_process(_step, config, pairs, checkpointing, at_once, precision)


def peak_of_run(config: dict, pairs: int, precision: str) -> int:
    """Bytes that a model, its batches and the steps of AdamW take in a fresh process."""
    return _in_fresh_process(_run, config, pairs, precision)


def _in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, *arguments))
    process.start()
    try:
        return here.recv()
    finally:
        process.join()


def _answer(answer: Any, function: Callable[..., int], *arguments: Any) -> None:
    torch.set_num_threads(1)
    _give_back()
    answer.send(function(*arguments))


def _step(config: dict, pairs: int, checkpointing: str, at_once: int | None, precision: str) -> int:
    model = create_dual_encoder(**{**config, "grad_checkpointing": checkpointing})
    batch = _batch(config, pairs)
    _forward_and_backward(model, batch, precision, pairs, at_once or pairs)  # what libraries allocate once
    model.zero_grad()
    with PeakMemory() as peak:
        _forward_and_backward(model, batch, precision, pairs, at_once or pairs)
    return peak.bytes


def _run(config: dict, pairs: int, precision: str) -> int:
    def steps() -> None:
        model = create_dual_encoder(**config)
        optimizer = build_optimizer(model, {"lr": 1e-3, "weight_decay": 0.0}, fused=True)
        for batch in [_batch(config, pairs) for _ in range(2)]:
            _forward_and_backward(model, batch, precision, pairs, pairs)
            optimizer.step()
            optimizer.zero_grad()

    steps()  # what libraries allocate once
    with PeakMemory() as peak:
        steps()
    return peak.bytes


def _give_back() -> None:
    """What is freed goes back from now on: else pages between stay resident."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def peak_of_shards(config: dict, pairs: int) -> int:
    """Bytes that a forward, loss and backward take above the shards of a model, on this rank."""
    _give_back()
    model = create_dual_encoder(**config)
    shard_towers(model, init_device_mesh("cpu", (group_size(),)))
    batch = _batch(config, pairs)

    def step() -> None:
        contrastive_loss(*model(*batch), **model.logit_parameters()).backward()
        average_gradients(model.parameters())
        model.zero_grad()

    step()  # what libraries allocate once
    with PeakMemory() as peak:
        step()
    return peak.bytes


def _batch(config: dict, pairs: int) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(256, (pairs, 3, config["image_size"], config["image_size"]), dtype=torch.uint8)
    return pixels, torch.randint(2, config["text"]["vocab_size"], (pairs, config["text"]["context_length"]))


def _forward_and_backward(model: DualEncoder, batch: Any, precision: str, pairs: int, at_once: int) -> None:
    """Of the first pairs, as `training/module.py` does it."""

    def backward(surrogate: Tensor, last: bool) -> None:
        with torch.autocast("cpu", enabled=False):
            surrogate.backward()

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        cached_backward(
            model,
            contrastive_loss,
            model.logit_parameters(),
            tuple(tensor[:pairs] for tensor in batch),
            micro_batch_size=at_once,
            backward=backward,
        )
