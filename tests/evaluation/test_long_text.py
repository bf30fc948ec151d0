import pytest
import torch
from torch.nn import functional as F

from clip_train.data.hf_tokenizer import HFTokenizer
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import ConfigError
from clip_train.evaluation.long_text import WAYS, embed_texts
from clip_train.models import create_dual_encoder
from tests.data.hf_tokenizers import bert_tokenizer
from tests.models.test_dual_encoder import TINY

SHORT = "A red thing."
LONG = (
    "The first sentence has a cat. " + "A second one is about twelve green bottles on a very long wall! " * 3 + "End."
)


@pytest.fixture(scope="module")
def encode():
    torch.manual_seed(0)
    return create_dual_encoder(**TINY).eval().encode_text


def embed(texts, encode, tokenizer=None, **options):
    tokenizer = tokenizer or ClipTokenizer(16)
    return embed_texts(texts, encode, tokenizer, device=torch.device("cpu"), **{"batch_size": 3, **options})


def encoded(encode, pieces: list[list[int]]) -> torch.Tensor:
    return encode(torch.from_numpy(ClipTokenizer(16).frame(pieces))).detach()


@pytest.mark.parametrize("way", WAYS)
def test_texts_that_fit_are_what_the_model_makes_of_them(encode, way):
    texts = [SHORT, "blue", "", "two words"]
    expected = encode(torch.from_numpy(ClipTokenizer(16)(texts)))
    assert torch.allclose(embed(texts, encode, way=way), expected, atol=1e-6)
    assert embed([], encode, way=way).shape[0] == 0


def test_each_way_by_its_definition(encode):
    (ids,) = ClipTokenizer(16).whole_ids([LONG])
    room = 14
    assert 3 * room < len(ids) < 4 * room, len(ids)
    parts = encoded(encode, [ids[len(ids) * i // 4 : len(ids) * (i + 1) // 4] for i in range(4)])
    windows = encoded(encode, [ids[i : i + room] for i in (*range(0, len(ids) - room, 5), len(ids) - room)])
    expected = {
        "truncate": encoded(encode, [ids[:room]])[0],
        "chunk_mean": parts.mean(0),
        "max_pool": parts.amax(0),
        "sliding_window": windows.mean(0),
    }
    for way, vector in expected.items():
        found = embed([SHORT, LONG, "x"], encode, way=way, stride=5)[1]
        assert torch.allclose(found, F.normalize(vector, dim=0), atol=1e-6), way
    assert not torch.allclose(expected["chunk_mean"], windows.mean(0), atol=1e-3)


def test_sentences_weigh_as_many_tokens_as_they_have(encode):
    tokenizer = ClipTokenizer(16)
    sentences = ["one cat.", "a green bottle stands on a wall!", "x " * 20 + "."]
    pieces = tokenizer.whole_ids(sentences)
    pieces = [*pieces[:2], pieces[2][:10], pieces[2][10:]]  # 21 tokens do not fit into 14
    weights = torch.tensor([float(len(piece)) for piece in pieces])
    expected = F.normalize(weights @ encoded(encode, pieces), dim=0)
    assert torch.allclose(embed([" ".join(sentences)], encode, way="hierarchical")[0], expected, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_tokenizer_of_transformers(tmp_path, side):
    tokenizer = HFTokenizer(bert_tokenizer(tmp_path), 8)
    tokenizer._tokenizer.padding_side = side
    texts = ["a dog", "a dog and a cat and a dog and a cat"]
    whole = tokenizer.whole_ids(texts)
    assert (tokenizer.frame([ids[: tokenizer.room] for ids in whole]) == tokenizer(texts)).all()
    assert len(whole[1]) > tokenizer.room == 6


def test_what_cannot_be(encode):
    with pytest.raises(ConfigError, match=r"^long_text=mean is none of truncate, "):
        embed([LONG], encode, way="mean")
    with pytest.raises(ConfigError, match=r"^stride=15 is not a number of tokens between 1 and the 14 of a window$"):
        embed([LONG], encode, way="sliding_window", stride=15)
