"""What is generated is what the model's probabilities say."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_train.errors import ConfigError
from clip_train.models.captioner import Captioner
from clip_train.models.generation import CaptionOptions, generate
from tests.interop.tiny import make_random, pixels
from tests.models.coca import COCA, our_coca

VOCABULARY = 6  # padding, three words, start, end
START, END = VOCABULARY - 2, VOCABULARY - 1


@pytest.fixture(scope="module")
def model() -> Captioner:
    model = our_coca(text={**COCA["text"], "vocab_size": VOCABULARY})
    make_random(model)
    with torch.no_grad():
        model.decoder.head.weight.mul_(1.5)
        model.decoder.head.weight[START] = model.decoder.head.weight[0] = -10  # they have next to no probability
    return model.eval().requires_grad_(False)


def log_probabilities(model: Captioner, images: Tensor, ids: list[int]) -> Tensor:
    tokens = model.encode_image_tokens(images)
    return model.next_token_logits(tokens, torch.tensor([ids] * len(images)), last=1)[:, 0].log_softmax(-1)


def until_end(row: Tensor) -> list[int]:
    ids = row.tolist()
    return ids[: ids.index(END) + 1] if END in ids else ids


def test_one_beam_takes_the_most_probable_token(model):
    found = generate(model, pixels(), CaptionOptions(num_beams=1, min_length=0, max_length=10))
    for image, row in zip(pixels(), found, strict=True):
        ids = [START]
        while ids[-1] != END and len(ids) < 10:
            ids.append(int(log_probabilities(model, image[None], ids).argmax()))
        assert until_end(row) == ids


@pytest.mark.parametrize("min_length", [0, 4])
def test_enough_beams_find_the_most_probable_caption(model, min_length):
    length, words = 5, [1, 2, 3]
    options = CaptionOptions(num_beams=100, length_penalty=0.0, min_length=min_length, max_length=length)
    found = generate(model, pixels(), options)
    captions = [
        [START, *middle, *end]
        for count in range(length)
        for middle in itertools.product(words, repeat=count)
        for end in ([END], [])
        if (len(middle) + 1 + len(end) == length if not end else min_length <= 1 + len(middle) < length)
    ]
    for image, row in zip(pixels(), found, strict=True):
        scores = []
        for caption in captions:
            steps = [
                log_probabilities(model, image[None], caption[:n])[0].index_fill(
                    0, torch.tensor([END] if n < min_length else [], dtype=torch.long), -torch.inf
                )
                for n in range(1, len(caption))
            ]
            scores.append(sum(step[token].item() for step, token in zip(steps, caption[1:], strict=True)))
        assert until_end(row) == max(zip(scores, captions))[1]


@pytest.mark.parametrize("generation_type", ["top_p", "top_k"])
def test_nothing_is_drawn_from_outside(model, generation_type):
    options: dict[str, Any] = {
        "generation_type": generation_type,
        "top_p": 0.6,
        "top_k": 2,
        "min_length": 0,
        "max_length": 6,
    }
    rows = [generate(model, pixels(), CaptionOptions(**options, seed=seed)) for seed in range(20)]
    drawn = {(number, *until_end(row)) for found in rows for number, row in enumerate(found)}
    assert len(drawn) > 6  # it does draw
    for number, *ids in drawn:
        for place in range(1, len(ids)):
            probabilities = log_probabilities(model, pixels()[[number]], ids[:place])[0].exp()
            likelier = probabilities[probabilities > probabilities[ids[place]]]
            assert likelier.sum() < 0.6 if generation_type == "top_p" else len(likelier) < 2


def test_a_seed_decides_and_leaves_the_random_numbers_of_others_alone(model):
    options: dict[str, Any] = {"generation_type": "top_p", "top_p": 1.0, "temperature": 2.0, "max_length": 16}
    torch.manual_seed(5)
    first = generate(model, pixels(), CaptionOptions(**options, seed=1))
    drawn = torch.rand(3)
    again = generate(model, pixels(), CaptionOptions(**options, seed=1))
    other = generate(model, pixels(), CaptionOptions(**options, seed=2))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_lengths_and_repetition(model):
    long = generate(model, pixels(), CaptionOptions(num_beams=2, min_length=8, max_length=12, repetition_penalty=5.0))
    assert all(8 <= len(until_end(row)) <= 12 for row in long)
    greedy: dict[str, Any] = {"num_beams": 1, "min_length": 10, "max_length": 11}
    words = [
        [len(set(until_end(row)[1:])) for row in generate(model, pixels(), CaptionOptions(**greedy, **more))]
        for more in [{}, {"repetition_penalty": 50.0}]
    ]
    assert sum(words[1]) > sum(words[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_type": "greedy"}, "generation_type=greedy is none of beam_search, top_p, top_k"),
        ({"num_beams": 0}, "num_beams=0: give at least 1"),
        ({"top_p": 1.5}, "top_p=1.5 is a share: give more than 0 and at most 1"),
        ({"temperature": 0}, "temperature=0: give more than 0"),
        ({"max_length": 5}, "max_length=5: give more than min_length=5"),
        ({"max_length": 17}, "max_length=17: the model's texts have at most 16 tokens"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        generate(model, pixels(), CaptionOptions(**options))
