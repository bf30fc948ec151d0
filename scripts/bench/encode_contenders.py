"""Who encodes pictures and captions in `encode.py`: our `clip-embed`, and what users of other libraries write."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset

IMAGE, TEXT = "image", "text"
OURS, OPEN_CLIP, TRANSFORMERS = "ours", "open_clip", "transformers"
FOLDERS = {OURS: "model.safetensors", OPEN_CLIP: "open_clip", TRANSFORMERS: "huggingface"}


@dataclass(frozen=True)
class Job:
    """What is measured.

    Attributes:
        contender: one of `FOLDERS`.
        side: `image`, from the shard to unit vectors, or `text`, from the shard's captions.
        models: folder with the model in each layout.
        config: the `model` config.
        shards: of jpg and txt files.
        precision: `32` or `bf16`.
        compile: by torch.compile.
        workers: loader processes.
    """

    contender: str
    side: str
    models: Path
    config: dict[str, Any]
    shards: Sequence[str]
    device: str
    precision: str
    compile: bool
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Sample:
    """One process's rate after its first batches, and what it made of the first samples."""

    per_second: float
    first: np.ndarray


class _Marks(list[tuple[int, float]]):
    """How many samples were done when."""

    def done(self, count: int) -> None:
        self.append((count, time.perf_counter()))

    def per_second(self, warm_up: int) -> float:
        (before, start), (after, end) = self[warm_up - 1], self[-1]
        return (after - before) / (end - start)


def measure_encoding(job: Job, warm_up: int) -> Sample:
    """Encode all samples once, or, with a compiler, once more than that, so that all shapes are known.

    Args:
        warm_up: batches that do not count.
    """
    run, marks = (_ours if job.contender == OURS else _theirs)(job), _Marks()
    if job.compile:
        run(_Marks())
    first = run(marks)
    return Sample(marks.per_second(warm_up), first)


def _ours(job: Job) -> Callable[[_Marks], np.ndarray]:
    """`clip-embed` itself, files and all."""
    from clip_train.embedding.embed import describe_weights, embed
    from clip_train.embedding.options import EmbedOptions
    from clip_train.evaluation.loaded_model import load_model
    from clip_train.interop.model_source import open_model
    from clip_train.shard_tools.access import ShardAccess

    source = open_model(str(job.models / FOLDERS[OURS]), job.config)
    described = describe_weights(source, {"weights": str(job.models)})
    options: dict[str, Any] = {"precision": job.precision, "compile": job.compile, "batch_size": job.batch_size}
    loaded = load_model(source, torch.device(job.device), **options, num_workers=job.workers)

    def run(marks: _Marks) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            return embed_into(folder, marks)

    def embed_into(folder: str, marks: _Marks) -> np.ndarray:
        files: dict[str, Any] = {"data": "::".join(job.shards), "output": f"{folder}/out", "image_key": "jpg"}
        kept: dict[str, Any] = {"metadata": [], "samples_per_part": 10_000, "dtype": "float32"}
        asked = EmbedOptions(**files, **kept, modality=job.side, caption_key="txt", **options)
        embed(loaded, described, asked, ShardAccess(folder, "1GB", 1, 60.0), lambda so_far: marks.done(so_far.samples))
        return np.load(next(Path(folder, "out").glob("*_emb/*_00000.npy")))[:8]

    return run


def _theirs(job: Job) -> Callable[[_Marks], np.ndarray]:
    """Their preparation in a DataLoader over the shards, their towers, unit vectors collected in memory."""
    prepare, encode = (_open_clip if job.contender == OPEN_CLIP else _transformers)(job)
    samples: Any = WebDataset(list(job.shards), shardshuffle=False).decode("pil")
    samples = samples.map(lambda sample: sample["jpg" if job.side == IMAGE else "txt"])
    loader = DataLoader(samples, job.batch_size, num_workers=job.workers, collate_fn=prepare)

    def run(marks: _Marks) -> np.ndarray:
        vectors, count = [], 0
        autocast = torch.autocast(job.device, torch.bfloat16, enabled=job.precision == "bf16")
        with torch.no_grad(), autocast:
            for batch in loader:
                vectors.append(F.normalize(encode(batch.to(job.device)).float(), dim=-1).cpu())
                count += len(vectors[-1])
                marks.done(count)
        return vectors[0][:8].numpy()

    return run


_Way = tuple[Callable[[list[Any]], Any], Callable[[Any], Tensor]]


def _open_clip(job: Job) -> _Way:
    import open_clip

    name = f"local-dir:{job.models / FOLDERS[OPEN_CLIP]}"
    model, _, transform = open_clip.create_model_and_transforms(name, device=job.device)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    encode: Any = model.encode_image if job.side == IMAGE else model.encode_text
    if job.compile:
        encode = torch.compile(encode)
    if job.side == TEXT:
        return tokenizer, encode
    return lambda pictures: torch.stack([transform(picture) for picture in pictures]), encode  # pyright: ignore


def _transformers(job: Job) -> _Way:
    from transformers import AutoProcessor, CLIPModel

    folder = str(job.models / FOLDERS[TRANSFORMERS])
    model: Any = CLIPModel.from_pretrained(folder)
    model, processor = model.to(job.device).eval(), AutoProcessor.from_pretrained(folder)
    tower = model.get_image_features if job.side == IMAGE else model.get_text_features
    tower = torch.compile(tower) if job.compile else tower
    key, options = ("images", {}) if job.side == IMAGE else ("text", {"padding": True, "truncation": True})
    return (
        lambda inputs: processor(**{key: inputs}, **options, return_tensors="pt"),
        lambda batch: tower(**batch).pooler_output,
    )
