import errno
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import TrainBatches
from clip_train.data.index import load_index, load_indexes
from clip_train.data.loader import BatchStarts, make_loader
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.tokenizer import ClipTokenizer
from tests.conftest import write_shard
from tests.data.photos import encode, photographs, psnr

AUGMENTATION = Augmentation(scale=(0.5, 1.0), flip_prob=0.5, color_jitter=(0.3, 0.3, 0.3, 0.1), color_jitter_prob=0.8)


def train_batches(shards, rank=0, world_size=1, batch_size=8, caption_key="json:captions", lanes=4) -> TrainBatches:
    reader = PairReader(load_indexes(shards), "png", caption_key)
    order = SampleOrder(reader.counts, seed=0, lanes=lanes, window=5)
    tokenizer = ClipTokenizer(16)
    return TrainBatches(reader, order, AUGMENTATION, tokenizer, 16, batch_size, rank, world_size)


def rows(batch) -> set[bytes]:
    return {i.numpy().tobytes() + t.numpy().tobytes() for i, t in zip(batch["image"].contiguous(), batch["text"])}


@pytest.mark.parametrize(("world_size", "lanes"), [(2, 4), (4, 4), (4, 3), (8, 4)])
def test_ranks_together_see_the_batch_of_one(make_shards, world_size, lanes):
    shards = make_shards([9, 4, 10])
    for start in (0, 16, 24):  # the second spans the epoch's end
        whole = train_batches(shards, lanes=lanes)[start]
        parts = [train_batches(shards, rank, world_size, lanes=lanes)[start] for rank in range(world_size)]
        assert all(part["image"].shape == (8 // world_size, 3, 16, 16) for part in parts)
        assert set.union(*map(rows, parts)) == rows(whole)


def test_a_batch_is_a_function_of_its_start(make_shards):
    shards = make_shards([9, 4, 10])
    assert rows(train_batches(shards)[8]) == rows(train_batches(shards, batch_size=8)[8])
    first, second = train_batches(shards)[0], train_batches(shards)[23]  # the same samples, an epoch later
    assert rows(first) != rows(second)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_change_the_stream(make_shards, num_workers):
    shards = make_shards([9, 4, 10])
    loaders = [make_loader(train_batches(shards), BatchStarts(16, 8), workers) for workers in (0, num_workers)]
    for _, alone, loaded in zip(range(7), *loaders):
        assert torch.equal(alone["image"], loaded["image"])
        assert torch.equal(alone["text"], loaded["text"])


def test_one_of_several_captions_is_drawn(make_shards):
    batches = train_batches(make_shards([9, 4, 10]), batch_size=23)
    texts = [{tuple(t) for t in batches[epoch * 23]["text"].tolist()} for epoch in range(8)]
    assert len(set.union(*texts)) == 46  # both captions of all 23, over the epochs
    assert all(len(epoch) == 23 for epoch in texts)


def test_unusable_samples_are_replaced_and_named(make_shards):
    bomb = encode(Image.new("L", (4000, 3000)))

    def damage(sample: dict) -> dict:
        broken = {3: {"png": b"broken"}, 4: {"txt": b" "}, 11: {"txt": b"\xff"}, 12: {"png": bomb}}
        return sample | broken.get(int(sample["__key__"]), {})

    shards = make_shards([9, 4, 10], damage)
    batch = replace(train_batches(shards, batch_size=23, caption_key="txt"), max_image_pixels=10_000_000)[0]
    assert batch["image"].shape[0] == 23
    assert batch["error"] == ""
    assert sorted(sample[:3] for sample in batch["bad"]) == [
        ("caption_empty", shards[0], "000004"),
        ("caption_not_utf8", shards[1], "000011"),
        ("image_too_large", shards[1], "000012"),
        ("image_unreadable", shards[0], "000003"),
    ]
    assert len({tuple(t) for t in batch["text"].tolist()}) == 19


def test_nothing_usable_is_an_error_that_travels(make_shards):
    batches = train_batches(make_shards([3], lambda sample: sample | {"png": b"broken"}))
    for num_workers in (0, 1):
        batch = next(iter(make_loader(batches, BatchStarts(0, 8), num_workers)))
        assert "3 unusable samples in a row" in batch["error"]


def test_pixels_travel_as_bytes(make_shards):
    batch = train_batches(make_shards([9, 4, 10]))[0]
    assert (batch["image"].dtype, batch["text"].dtype) == (torch.uint8, torch.int64)


def test_a_shard_that_shrinks_or_vanishes_is_named(make_shards):
    shards = make_shards([9, 4, 10])
    batches = train_batches(shards, batch_size=23)
    assert not batches[0]["error"]
    Path(shards[2]).write_bytes(Path(shards[2]).read_bytes()[:5000])
    assert f"shard {shards[2]} has become shorter" in batches[0]["error"]
    Path(shards[2]).unlink()
    fresh = replace(batches, reader=pickle.loads(pickle.dumps(batches.reader)))  # as a new worker has it
    failed = fresh[0]
    assert f"shard {shards[2]} cannot be read any more: it does not exist" in failed["error"] and not failed.get(
        "passing"
    )


@pytest.mark.parametrize(("failures", "comes_back"), [(2, True), (1000, False)])
def test_a_file_server_that_is_away_for_a_while(make_shards, monkeypatch, failures, comes_back):
    batches = train_batches(make_shards([9, 4, 10]), batch_size=23)
    expected = batches[0]
    fresh = replace(batches, reader=pickle.loads(pickle.dumps(batches.reader)))
    pread, waits, stale = os.pread, [], []

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if len(stale) < failures:
            stale.append(descriptor)
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr("clip_train.data.retries.wait", lambda seconds, cancelled: waits.append(seconds))
    closed = []
    monkeypatch.setattr(os, "close", lambda descriptor, close=os.close: (closed.append(descriptor), close(descriptor)))
    found = fresh[0]
    assert closed[: len(stale)] == stale  # what a server has forgotten stays useless
    if comes_back:
        assert torch.equal(found["image"], expected["image"]) and torch.equal(found["text"], expected["text"])
    else:
        assert re.search("shard .* cannot be read any more: given up after .*Stale file handle", found["error"])
        assert found.get("passing") and len(waits) == 15


def test_fast_and_exact_decoding_take_the_same_crop(tmp_path):
    photo = photographs()[0].resize((1024, 1200))
    sample = {"__key__": "photo", "jpg": encode(photo, "JPEG", quality=95), "txt": "a portrait"}
    shards = [write_shard(tmp_path / "00000.tar", [sample])]
    reader, order = PairReader(load_indexes(shards), "jpg", "txt"), SampleOrder([1], seed=0)
    fast = TrainBatches(reader, order, Augmentation(scale=(0.5, 1.0)), ClipTokenizer(16), 224, batch_size=4)
    quick, exact = (replace(fast, decode=decode)[0]["image"].numpy() for decode in ("fast", "exact"))
    assert not np.array_equal(quick, exact)
    assert min(psnr(a, b) for a, b in zip(quick, exact)) > 30


def test_names_tell_which_samples_a_batch_is_made_of(make_shards):
    shards = make_shards([9, 4, 10])
    assert train_batches(shards)[0]["names"] == []
    names = replace(train_batches(shards, batch_size=23), with_names=True)[0]["names"]
    assert sorted(names) == sorted(f"{shard}[{n}]" for shard, count in zip(shards, (9, 4, 10)) for n in range(count))


def test_the_name_of_a_replaced_sample_is_that_of_its_replacement(make_shards):
    shards = make_shards([4], lambda sample: sample | ({"png": b"broken"} if sample["__key__"] == "000001" else {}))
    names = replace(train_batches(shards, batch_size=4), with_names=True)[0]["names"]
    assert sorted(names) == [f"{shards[0]}[{n}]" for n in (0, 2, 2, 3)]


def test_a_remote_shard_that_is_much_shorter_than_said(make_shards):
    (shard,) = make_shards([10])
    remote = SimpleNamespace(shard="s3://x/0.tar", count=500)
    remote.open = lambda: (os.open(shard, os.O_RDONLY), load_index(shard))
    reader = PairReader(cast(Any, [remote]), "png", "txt")
    order = SampleOrder(reader.counts, seed=0)
    batch = TrainBatches(reader, order, AUGMENTATION, ClipTokenizer(16), 16, batch_size=500)[0]
    assert batch["error"] == ""
    assert {sample.kind for sample in batch["bad"]} == {"file_missing"} and len(batch["bad"]) == 490


def test_words_are_dropped_by_position(make_shards):
    shards = make_shards([9, 4, 10])
    plain = train_batches(shards, batch_size=23)
    dropped = [replace(plain, word_dropout=0.5)[start]["text"] for start in (0, 0, 23)]
    assert torch.equal(dropped[0], dropped[1])
    lengths = [(text != 0).sum() for text in (plain[0]["text"], *dropped)]
    assert lengths[1] < lengths[0]
    assert lengths[3] != lengths[1] or not torch.equal(dropped[2], dropped[1])


def test_stages_of_loading_are_timed(make_shards):
    seconds = train_batches(make_shards([9, 4, 10]))[0]["seconds"]
    assert set(seconds) == {"read", "decode", "augment", "tokenize", "collate"}
    assert all(spent > 0 for spent in seconds.values())
