"""What `loader.py` compares, each in a process of its own that is bound to one core.

    python scripts/bench/loader_contenders.py NAME FOLDER --core 1 --seconds 5

prints what it did as JSON. Libraries are imported where they are used: not every contender's environment has all.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 64
IMAGE_SIZE = 224
_CROP_SCALE = (0.9, 1.0)


class Done(NamedTuple):
    """One batch: how many samples, and figures to add up."""

    samples: int
    details: Mapping[str, float] = {}


@dataclass(frozen=True)
class Contender:
    """A loader, a part of one, or a tokenizer.

    Attributes:
        run: does a batch each time it is asked for one, endlessly, of the set in a folder.
        packages: what it needs beside the project's environment, in one of its own.
    """

    run: Callable[[Path], Iterator[Done]]
    packages: Sequence[str] = field(default=())


def _ours(folder: Path, decode: str) -> Iterator[Done]:
    from clip_train.data.augmentation import Augmentation
    from clip_train.data.batches import TrainBatches
    from clip_train.data.index import load_indexes
    from clip_train.data.order import SampleOrder
    from clip_train.data.pairs import PairReader
    from clip_train.data.tokenizer import ClipTokenizer

    reader = PairReader(load_indexes(_shards(folder)), "jpg;jpeg;png;webp", "txt")
    order = SampleOrder(reader.counts, seed=0)
    batches = TrainBatches(reader, order, Augmentation(), ClipTokenizer(), IMAGE_SIZE, BATCH, decode=decode)
    for start in count(0, BATCH):
        batch = batches[start]
        if batch["error"]:
            raise RuntimeError(batch["error"])
        yield Done(len(batch["image"]), batch["seconds"])


def _open_clip(folder: Path) -> Iterator[Done]:
    """open_clip's own pipeline, shuffle buffers and all, in this process (--workers 0)."""
    from open_clip import get_tokenizer, image_transform
    from open_clip_train.data import get_wds_dataset
    from open_clip_train.params import parse_args

    shards = f"{folder}/{{00000..{len(_shards(folder)) - 1:05d}}}.tar"
    args = parse_args([
        "--train-data", shards, "--train-num-samples", str(_num_samples(folder)),
        "--dataset-type", "webdataset", "--batch-size", str(BATCH), "--workers", "0",
    ])  # fmt: skip
    args.world_size = 1
    data = get_wds_dataset(args, image_transform(IMAGE_SIZE, is_train=True), True, tokenizer=get_tokenizer("ViT-B-32"))
    for epoch in count():
        data.set_epoch(epoch)
        for images, _ in data.dataloader:
            yield Done(len(images))


def _energon(folder: Path) -> Iterator[Done]:
    """A captioning dataset as the documentation of energon sets one up, in this process (0 workers)."""
    from megatron import energon  # pyright: ignore[reportMissingImports]
    from open_clip import get_tokenizer

    tokenizer, transform = get_tokenizer("ViT-B-32"), _torchvision_transform()

    class Encoder(energon.DefaultTaskEncoder):
        decoder = energon.SampleDecoder(image_decode="pilrgb")

        @energon.stateless(restore_seeds=True)
        def encode_sample(self, sample: Any) -> Any:
            sample.image, sample.caption = transform(sample.image), tokenizer(sample.caption)[0]
            return sample

    if not (folder / ".nv-meta").exists():
        fields = json.dumps({"image": "jpg", "caption": "txt"})
        options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
        command = [Path(sys.executable).with_name("energon"), "prepare", *options, "--field-map", fields, folder]
        subprocess.run(command, check=True, stdout=sys.stderr)
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        folder,
        worker_config=workers,
        batch_size=BATCH,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    for batch in energon.get_loader(dataset):
        yield Done(len(batch.image))


def _torchvision(folder: Path) -> Iterator[Done]:
    """The least one would write oneself: tars from front to end, Pillow, torchvision."""
    import io

    import torch
    from open_clip import get_tokenizer
    from PIL import Image

    transform, tokenizer = _torchvision_transform(), get_tokenizer("ViT-B-32")
    samples = _samples(folder)
    while True:
        pictures, captions = zip(*(next(samples) for _ in range(BATCH)))
        images = torch.stack([transform(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in pictures])
        tokenizer(list(captions))
        yield Done(len(images))


def _torchvision_transform() -> Callable[[Any], Any]:
    from torchvision.transforms import Compose, InterpolationMode, RandomResizedCrop, ToTensor

    crop = RandomResizedCrop(IMAGE_SIZE, scale=_CROP_SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return Compose([crop, ToTensor()])


def _decode_only(folder: Path, halving: bool) -> Iterator[Done]:
    """JPEGs that are in memory, in libjpeg-turbo's quickest way, no smaller than the model wants them.

    Args:
        halving: take 1, 1/2, 1/4 or 1/8 of the size; else the smallest number of eighths.
    """
    import simplejpeg

    jobs = []
    for jpeg, _ in islice(_samples(folder), _num_samples(folder)):
        height, width = (int(side) for side in simplejpeg.decode_jpeg_header(jpeg)[:2])
        if halving:
            by = next((by for by in (8, 4, 2) if min(height, width) / by >= IMAGE_SIZE), 1)
            jobs.append((jpeg, -(-height // by), -(-width // by)))
        else:
            jobs.append((jpeg, IMAGE_SIZE, IMAGE_SIZE))
    while True:
        for start in range(0, len(jobs), BATCH):
            for jpeg, height, width in jobs[start : start + BATCH]:
                simplejpeg.decode_jpeg(jpeg, min_height=height, min_width=width, fastdct=True, fastupsample=True)
            yield Done(BATCH)


def _tokenizer(folder: Path, make: Callable[[], Callable[[list[str]], Any]]) -> Iterator[Done]:
    """Captions by the batch; all once before, as both keep the words they have met."""
    tokenizer = make()
    captions = json.loads((folder / "set.json").read_text())["captions"]
    captions = captions[: len(captions) // BATCH * BATCH]
    tokenizer(captions)
    while True:
        for start in range(0, len(captions), BATCH):
            ids = tokenizer(captions[start : start + BATCH])
            yield Done(len(ids), {"ids": int((ids.argmax(-1) + 1).sum())})  # the end token has the highest id


def _our_tokenizer() -> Callable[[list[str]], Any]:
    from clip_train.data.tokenizer import ClipTokenizer

    return ClipTokenizer()


def _open_clip_tokenizer() -> Callable[[list[str]], Any]:
    from open_clip import get_tokenizer

    return get_tokenizer("ViT-B-32")


def _shards(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def _num_samples(folder: Path) -> int:
    return json.loads((folder / "set.json").read_text())["num_samples"]


def _samples(folder: Path) -> Iterator[tuple[bytes, str]]:
    """Pictures and captions in the order of the shards, again and again."""
    while True:
        for shard in _shards(folder):
            with tarfile.open(shard, "r|") as tar:
                contents = (tar.extractfile(member).read() for member in tar)  # pyright: ignore[reportOptionalMemberAccess]
                for jpeg, caption in zip(contents, contents):
                    yield jpeg, caption.decode()


# With webdataset 1.x open_clip's reader fails (KeyError: 'fname').
_OPEN_CLIP_PACKAGES = ("open-clip-torch", "webdataset==0.2.86", "pandas")
_ENERGON_PACKAGES = ("open-clip-torch", "megatron-energon==7.4.1")

LOADERS = {
    "ours": Contender(lambda folder: _ours(folder, "fast")),
    "ours, decode=exact": Contender(lambda folder: _ours(folder, "exact")),
    "open_clip": Contender(_open_clip, _OPEN_CLIP_PACKAGES),
    "megatron-energon": Contender(_energon, _ENERGON_PACKAGES),
    "tarfile, Pillow, torchvision": Contender(_torchvision),
    "decode only": Contender(lambda folder: _decode_only(folder, halving=True)),
    "decode only, any eighths": Contender(lambda folder: _decode_only(folder, halving=False)),
}
TOKENIZERS = {
    "our tokenizer": Contender(lambda folder: _tokenizer(folder, _our_tokenizer)),
    "open_clip's tokenizer": Contender(lambda folder: _tokenizer(folder, _open_clip_tokenizer)),
}
CONTENDERS = LOADERS | TOKENIZERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CONTENDERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="after them a pass over the set is the last")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    print(json.dumps(_measured(CONTENDERS[args.name], args.folder, args.seconds)))


def _measured(contender: Contender, folder: Path, seconds: float) -> dict[str, float]:
    """Whole passes over the set, so that what is done once per epoch counts as often as it comes."""
    import torch

    torch.set_num_threads(1)
    for shard in _shards(folder):
        Path(shard).read_bytes()
    batches = contender.run(folder)
    next(batches)
    samples, details = 0, Counter()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - begun) < seconds:
        for _ in range(_num_samples(folder) // BATCH):
            batch = next(batches)
            samples += batch.samples
            details.update(batch.details)
    return {"samples": samples, "seconds": elapsed, "cpu_seconds": time.process_time() - begun_cpu, **details}


if __name__ == "__main__":
    main()
