"""The training steps that `large_batch.py` compares, and one measured run of one of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from hydra import compose, initialize_config_dir
from measure import PeakMemory
from omegaconf import OmegaConf
from open_clip.loss import ClipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor

from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.optimizer import build_optimizer

_CONFIGS = Path(__file__).parents[2] / "configs"
_ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.2, "betas": (0.9, 0.98), "eps": 1e-6}
OPEN_CLIP_NAMES = {
    "vit_b_32": "ViT-B-32-quickgelu",
    "vit_b_16": "ViT-B-16-quickgelu",
    "vit_l_14": "ViT-L-14-quickgelu",
}


@dataclass
class Sample:
    """One process's step: median seconds, and peak memory above weights, moments and the batch."""

    seconds: float
    memory: int


def measure_step(contender: str, model: str, batch: int, micro_batch: int, steps: int) -> Sample:
    """Time some steps, after one that allocates the optimizer's state."""
    torch.manual_seed(0)
    step = CONTENDERS[contender](model, batch, micro_batch)
    step()
    seconds = []
    with PeakMemory() as peak:
        for _ in range(steps):
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
    return Sample(statistics.median(seconds), peak.bytes)


def _config(model: str) -> dict[str, Any]:
    with initialize_config_dir(str(_CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=demo", f"model={model}"])
    return OmegaConf.to_container(cfg.model, resolve=True)  # pyright: ignore[reportReturnType]


def _batch(model: str, count: int) -> tuple[Tensor, Tensor]:
    config = _config(model)
    size, length = config["image_size"], config["text"]["context_length"]
    ids = torch.randint(1, 49000, (count, length))
    ids[:, 12:] = 0  # captions have some eleven words
    ids[:, 12] = 49407
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8), ids


def _ours(model: str, batch: int, micro_batch: int | None) -> Callable[[], None]:
    encoder = create_dual_encoder(**_config(model))
    optimizer = build_optimizer(encoder, _ADAMW, fused=True)
    inputs = _batch(model, batch)

    def step() -> None:
        optimizer.zero_grad()
        if micro_batch is None:
            contrastive_loss(*encoder(*inputs), **encoder.logit_parameters()).backward()
        else:
            cached_backward(
                encoder,
                contrastive_loss,
                encoder.logit_parameters(),
                inputs,
                micro_batch_size=micro_batch,
                backward=lambda scalar, last: scalar.backward(),
            )
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        encoder.clamp_logit_scale()

    return step


class _Loader(list[tuple[Tensor, Tensor]]):
    """Batches as open_clip's training loop expects them."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(texts) for _, texts in self)


def _open_clip(model: str, batch: int, micro_batch: int | None) -> Callable[[], None]:
    """A step of open_clip's own training loop: an epoch of one step."""
    clip = open_clip.create_model(OPEN_CLIP_NAMES[model], output_dict=True)
    pixels, ids = _batch(model, batch)
    pieces = [slice(start, start + (micro_batch or batch)) for start in range(0, batch, micro_batch or batch)]
    loader = _Loader([(pixels[part] / 127.5 - 1, ids[part]) for part in pieces])
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    decayed = [p for p in clip.parameters() if p.ndim >= 2]
    others = [p for p in clip.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **_ADAMW)
    args = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=len(pieces), skip_scheduler=True, horovod=False,
        grad_clip_norm=1.0, rank=0, log_every_n_steps=1, batch_size=batch, world_size=1, wandb=False,
    )  # fmt: skip
    return lambda: train_one_epoch(clip, data, ClipLoss(), 0, optimizer, None, None, None, args)


CONTENDERS: dict[str, Callable[[str, int, int], Callable[[], None]]] = {
    "ours, whole batch": lambda model, batch, micro_batch: _ours(model, batch, None),
    "ours, cached": _ours,
    "open_clip, whole batch": lambda model, batch, micro_batch: _open_clip(model, batch, None),
    "open_clip, --accum-freq": _open_clip,
}
