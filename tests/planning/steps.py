"""Real models, steps and their peak memory, for what is planned to be held against."""

import ctypes

import torch

from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.models.checkpointing import NONE
from clip_train.training.cached_gradients import cached_backward
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
# Of whose weights and gradients there is as much as of activations.
WORDY = {**VIT, "text": {**TEXT, "vocab_size": 100_000}}
CONVNET = {**VIT, "vision": {"name": "convnext_atto"}, "image_size": 96}


def peak_of_step(config: dict, pairs: int, checkpointing: str = NONE, at_once: int | None = None) -> int:
    """Bytes that a forward, loss and backward in a fresh process take above the model, in micro-batches if so said."""
    here, there = context.Pipe()
    process = context.Process(target=_step, args=(config, pairs, checkpointing, at_once, there))
    process.start()
    try:
        return here.recv()
    finally:
        process.join()


def _step(config: dict, pairs: int, checkpointing: str, at_once: int | None, answer) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back: else pages between stay resident
    model = create_dual_encoder(**config, grad_checkpointing=checkpointing)
    pixels = torch.randint(256, (pairs, 3, config["image_size"], config["image_size"]), dtype=torch.uint8)
    ids = torch.randint(2, config["text"]["vocab_size"], (pairs, config["text"]["context_length"]))

    def step(some: int, at_once: int) -> None:
        cached_backward(
            model,
            contrastive_loss,
            model.logit_parameters(),
            (pixels[:some], ids[:some]),
            micro_batch_size=at_once,
            backward=lambda surrogate, last: surrogate.backward(),
        )
        model.zero_grad()

    step(4, 2)  # what libraries allocate once
    with PeakMemory() as peak:
        step(pairs, at_once or pairs)
    answer.send(peak.bytes)
