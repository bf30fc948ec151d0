import numpy as np
import pytest
import torch

from clip_train.data.batches import BatchStarts, EvalBatches, TrainBatches, make_loader, rank_slices
from clip_train.data.images import Augmentation
from clip_train.data.index import load_indexes
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.tokenizer import ClipTokenizer

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
    def damage(sample: dict) -> dict:
        broken = {3: {"png": b"broken"}, 4: {"txt": b" "}, 11: {"txt": b"\xff"}}
        return sample | broken.get(int(sample["__key__"]), {})

    shards = make_shards([9, 4, 10], damage)
    batch = train_batches(shards, batch_size=23, caption_key="txt")[0]
    assert batch["image"].shape[0] == 23
    assert batch["error"] == ""
    assert sorted(batch["bad"]) == [f"{shards[0]}[3]", f"{shards[0]}[4]", f"{shards[1]}[2]"]
    assert len({tuple(t) for t in batch["text"].tolist()}) == 20


def test_nothing_usable_is_an_error_that_travels(make_shards):
    batches = train_batches(make_shards([3], lambda sample: sample | {"png": b"broken"}))
    for num_workers in (0, 1):
        batch = next(iter(make_loader(batches, BatchStarts(0, 8), num_workers)))
        assert "3 unusable samples in a row" in batch["error"]


def test_pixels_travel_as_bytes(make_shards):
    batch = train_batches(make_shards([9, 4, 10]))[0]
    assert (batch["image"].dtype, batch["text"].dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 5, 16, 23])
def test_evaluation_slices_cover_the_set_once_in_equally_many_batches(count, world_size):
    slices = [rank_slices(count, rank, world_size, max_batch=4) for rank in range(world_size)]
    assert [i for part in slices for piece in part for i in piece] == list(range(count))
    assert len({len(part) for part in slices}) == 1
    assert max(len(piece) for part in slices for piece in part) <= 4


def test_evaluation_reads_in_order_with_the_first_caption(make_shards):
    reader = PairReader(load_indexes(make_shards([3, 2])), "png", "json:captions")
    batches = EvalBatches(reader, ClipTokenizer(16), 16)
    batch = batches[range(2, 5)]
    expected = ClipTokenizer(16)([f"a {c} thing number {n}" for n, c in ((2, "blue"), (3, "yellow"), (4, "pink"))])
    assert np.array_equal(batch["text"], expected)
    assert batches.picture_and_caption(3)[1] == "a yellow thing number 3"


def test_evaluation_does_not_replace_samples(make_shards):
    shards = make_shards([3], lambda s: s | ({"png": b"broken"} if s["__key__"] == "000001" else {}))
    batches = EvalBatches(PairReader(load_indexes(shards), "png", "txt"), ClipTokenizer(16), 16)
    assert f"{shards[0]}[1] cannot be used" in batches[range(3)]["error"]
