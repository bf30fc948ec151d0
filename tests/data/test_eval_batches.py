import numpy as np
import pytest

from clip_train.data.eval_batches import EvalBatches, rank_slices
from clip_train.data.index import load_indexes
from clip_train.data.loader import make_loader
from clip_train.data.pairs import PairReader
from clip_train.data.tokenizer import ClipTokenizer


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


def test_a_rank_without_samples_gets_empty_batches_from_workers(make_shards):
    batches = EvalBatches(PairReader(load_indexes(make_shards([1])), "png", "txt"), ClipTokenizer(16), 16)
    (empty,) = rank_slices(1, rank=0, world_size=2, max_batch=4)
    assert len(empty) == 0
    (batch,) = make_loader(batches, [empty], num_workers=1)
    assert (batch["error"], batch["image"].shape, batch["text"].shape) == ("", (0, 3, 16, 16), (0, 16))
