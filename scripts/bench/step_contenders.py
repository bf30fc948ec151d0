"""The training steps that `step.py` and `large_batch.py` compare, and one measured run of one of them."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from measure import PeakMemory
from omegaconf import OmegaConf
from torch import Tensor, nn

from clip_train.data.tokenizer import ClipTokenizer
from clip_train.losses import contrastive_loss
from clip_train.models import create_dual_encoder
from clip_train.models.activation_checkpointing import NONE
from clip_train.models.compiling import compile_blocks
from clip_train.models.cpu_attention import fast_attention
from clip_train.models.float8 import use_float8
from clip_train.models.text_lengths import with_lengths
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.optim.optimizer import build_optimizer
from clip_train.training.sorted_texts import sort_texts

_CONFIGS = Path(__file__).parents[2] / "configs"
_ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.2, "betas": (0.9, 0.98), "eps": 1e-6}
OPEN_CLIP_NAMES = {
    "vit_b_32": "ViT-B-32-quickgelu",
    "vit_b_16": "ViT-B-16-quickgelu",
    "vit_l_14": "ViT-L-14-quickgelu",
}


@dataclass(frozen=True)
class StepJob:
    """A step to be measured.

    Attributes:
        contender: one of `CONTENDERS`.
        model: one of `OPEN_CLIP_NAMES`.
        batch, micro_batch: pairs per step, and at once where gradients are cached.
        captions: texts, from which those of the batch are taken in turn.
        precision: `32`, or `bf16` for autocast.
        threads: of the processor.
        steps: that are timed, after those that allocate the optimizer's state and compile.
        open_clip_main: folder of a checkout of open_clip's main branch, for the contender of that name.
        compile, checkpointing, float8: of ours: one of torch.compile's modes or none, and as `model.grad_checkpointing`
            and `trainer.float8`.
    """

    contender: str
    model: str
    batch: int
    micro_batch: int
    captions: Sequence[str]
    device: str = "cpu"
    precision: str = "32"
    threads: int = 1
    steps: int = 2
    compile: str = ""
    checkpointing: str = NONE
    float8: bool = False
    open_clip_main: str = ""


@dataclass
class Sample:
    """One process's step: median seconds, and peak memory above weights, moments and the batch."""

    seconds: float
    memory: int


def measure_step(job: StepJob) -> Sample:
    """Time some steps."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    step = CONTENDERS[job.contender](job)
    for _ in range(3 if job.compile else 1):
        step()
    seconds = []
    with PeakMemory(job.device) as peak:
        for _ in range(job.steps):
            _wait(job.device)
            begun = time.perf_counter()
            step()
            _wait(job.device)
            seconds.append(time.perf_counter() - begun)
    return Sample(statistics.median(seconds), peak.bytes)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def model_config(model: str) -> dict[str, Any]:
    """One of configs/model."""
    with initialize_config_dir(str(_CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=demo", f"model={model}"])
    return OmegaConf.to_container(cfg.model, resolve=True)  # pyright: ignore[reportReturnType]


def _batch(job: StepJob) -> tuple[Tensor, Tensor]:
    """On the host."""
    config = model_config(job.model)
    size, length = config["image_size"], config["text"]["context_length"]
    captions = [job.captions[number % len(job.captions)] for number in range(job.batch)]
    pixels = torch.randint(0, 256, (job.batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return pixels, torch.from_numpy(ClipTokenizer(length)(captions))


def _autocast(job: StepJob) -> torch.autocast:
    return torch.autocast(job.device.partition(":")[0], torch.bfloat16, enabled=job.precision == "bf16")


def _ours(job: StepJob, micro_batch: int | None) -> Callable[[], None]:
    config: dict[str, Any] = {**model_config(job.model), "grad_checkpointing": job.checkpointing}
    encoder = create_dual_encoder(**config).to(job.device)
    if job.float8:
        use_float8(encoder)
    if job.compile:
        compile_blocks(encoder, job.compile)
    optimizer = build_optimizer(encoder, _ADAMW, fused=True)
    pixels, ids = _batch(job)
    inputs: Any = (pixels.to(job.device), with_lengths(ids.to(job.device), ids, encoder.text))

    def backward(scalar: Tensor, last: bool = True) -> None:
        with torch.autocast(scalar.device.type, enabled=False):  # which is for forward only
            scalar.backward()

    def step() -> None:
        optimizer.zero_grad()
        with fast_attention(torch.device(job.device)), _autocast(job):
            scalars = encoder.logit_parameters()
            if micro_batch is None:
                backward(contrastive_loss(*encoder(*inputs), **scalars))
            else:
                parts = {"micro_batch_size": micro_batch, "backward": backward}
                sorted_inputs, loss = sort_texts(inputs, contrastive_loss)
                cached_backward(encoder, loss, scalars, sorted_inputs, **parts)
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        encoder.clamp_logit_scale()

    return step


class _Loader(list[Any]):
    """Batches as open_clip's training loop expects them."""

    def __init__(self, batches: Sequence[Any], num_samples: int) -> None:
        super().__init__(batches)
        self.num_samples = num_samples

    @property
    def num_batches(self) -> int:
        return len(self)


def _open_clip(job: StepJob, micro_batch: int | None) -> Callable[[], None]:
    """A step of open_clip's own training loop: an epoch of one step."""
    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    clip = open_clip.create_model(OPEN_CLIP_NAMES[job.model], output_dict=True, device=job.device)
    data, optimizer, args = _for_open_clip(job, clip, micro_batch or job.batch)
    return lambda: train_one_epoch(clip, data, ClipLoss(), 0, optimizer, None, None, None, args)


def _open_clip_main(job: StepJob) -> Callable[[], None]:
    """The same of a checkout of its main branch, whose loop takes a task that has the model, and dictionaries."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("open_clip", "open_clip_train")]:
        del sys.modules[name]  # what is installed
    sys.path.insert(0, f"{job.open_clip_main}/src")
    open_clip, tasks = import_module("open_clip"), import_module("open_clip.task")
    loop = import_module("open_clip_train.train")
    clip = open_clip.create_model(OPEN_CLIP_NAMES[job.model], output_dict=True, device=job.device)
    data, optimizer, args = _for_open_clip(job, clip, job.batch)
    loader = data["train"].dataloader
    loader[:] = [{"image": pixels, "text": ids} for pixels, ids in loader]
    state = loop.TrainState(tasks.CLIPTask(clip), optimizer)
    return lambda: loop.train_one_epoch(state, data, args)


def _for_open_clip(
    job: StepJob, clip: nn.Module, at_once: int
) -> tuple[dict[str, SimpleNamespace], torch.optim.Optimizer, SimpleNamespace]:
    """The data of an epoch, the optimizer and the arguments that its loops take."""
    pixels, ids = _batch(job)
    pieces = [slice(start, start + at_once) for start in range(0, job.batch, at_once)]
    batches = [((pixels[part].contiguous() / 127.5 - 1).to(job.device), ids[part].to(job.device)) for part in pieces]
    decayed = [p for p in clip.parameters() if p.ndim >= 2]
    others = [p for p in clip.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    args = SimpleNamespace(
        device=job.device,
        precision="amp_bf16" if job.precision == "bf16" else "fp32",
        accum_freq=len(pieces),
        batch_size=job.batch,
        grad_clip_norm=1.0,
        log_every_n_steps=1,
        rank=0,
        world_size=1,
        **dict.fromkeys(("distill", "distributed", "horovod", "wandb"), False),
        skip_scheduler=True,
    )
    data = {"train": SimpleNamespace(dataloader=_Loader(batches, job.batch), set_epoch=lambda epoch: None)}
    return data, torch.optim.AdamW(groups, **_ADAMW), args


CONTENDERS: dict[str, Callable[[StepJob], Callable[[], None]]] = {
    "ours, whole batch": lambda job: _ours(job, None),
    "ours, cached": lambda job: _ours(job, job.micro_batch),
    "open_clip, whole batch": lambda job: _open_clip(job, None),
    "open_clip main, whole batch": _open_clip_main,
    "open_clip, --accum-freq": lambda job: _open_clip(job, job.micro_batch),
}
