import logging
from contextlib import nullcontext

import pytest
import torch

from clip_train.data.eval_batches import EvalBatches
from clip_train.data.index import load_indexes
from clip_train.data.pairs import PairReader
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import DataError
from clip_train.evaluation import progress
from clip_train.evaluation.features import Features, encode_pairs
from clip_train.evaluation.picture import draw_retrieval
from clip_train.models import create_dual_encoder
from tests.models.test_dual_encoder import TINY
from tests.ranks import run_on_ranks


def validation_set(shards) -> EvalBatches:
    return EvalBatches(PairReader(load_indexes(shards), "png", "txt"), ClipTokenizer(16), 32)


def encode(shards) -> Features | str:
    torch.manual_seed(0)
    model = create_dual_encoder(**TINY)
    try:
        return encode_pairs(model, validation_set(shards), batch_size=4, num_workers=0, autocast=nullcontext())
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("count", [2, 13])
def test_every_pair_once_in_order_on_any_number_of_ranks(make_shards, count):
    shards = make_shards([count])
    expected = encode(shards)
    assert isinstance(expected, Features)
    assert expected.image.shape == expected.text.shape == (count, 32)
    for features in run_on_ranks(encode, 3, shards):
        assert torch.allclose(features.image, expected.image, atol=1e-6)
        assert torch.allclose(features.text, expected.text, atol=1e-6)


def test_a_broken_sample_on_one_rank_is_an_error_on_all(make_shards):
    shards = make_shards([9], lambda s: s | ({"png": b"broken"} if s["__key__"] == "000008" else {}))
    errors = run_on_ranks(encode, 2, shards)
    assert all(f"{shards[0]}[8] cannot be used" in error for error in errors)


def test_the_log_tells_how_far_it_is(make_shards, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    shards = make_shards([9])
    encode(shards)
    assert not caplog.messages  # it takes no time
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    encode(shards)
    said = [message.rpartition(", ")[0] for message in caplog.messages]
    assert said[:3] == ["3 of 9 images", "6 of 9 images", "9 of 9 images"] and said[3].startswith("9 images in ")


def test_the_model_goes_on_training(make_shards):
    model = create_dual_encoder(**TINY).train()
    encode_pairs(model, validation_set(make_shards([3])), batch_size=2, num_workers=0, autocast=nullcontext())
    assert model.training


def test_picture(make_shards, tmp_path):
    shards = make_shards([9], lambda sample: sample | {"txt": "$5 & more <b> " + "long " * 20})
    features = encode(shards)
    assert isinstance(features, Features)
    draw_retrieval(tmp_path / "retrieval.png", "title", validation_set(shards), features)
    assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.glob("*.png")] == ["retrieval.png"]
