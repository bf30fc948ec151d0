"""Texts encoded in groups of similar length: what the padded forward gives, and every parameter's gradient."""

import logging
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from clip_train.errors import ConfigError
from clip_train.models import create_dual_encoder, text_lengths
from clip_train.models.hf_text import HFTextTower
from clip_train.models.siglip_text import SiglipTextTower
from clip_train.models.text_config import TextConfig
from clip_train.models.text_lengths import TokenIds
from clip_train.models.text_tower import TextTower
from clip_train.training.parts import make_model
from tests.models.configs import load_config

LENGTHS = (3, 17, 9, 4, 8, 20, 2, 16)
GROUPS = [(1, 8), (1, 12), (1, 16), (2, 20), (3, 4)]  # texts, tokens
CONTEXT = 20
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tower(kind: str, multiple: int | None = 4) -> TextTower | HFTextTower:
    torch.manual_seed(0)
    if kind == "clip":
        return TextTower(32, 2, 2, CONTEXT, 24, vocab_size=100, length_multiple=multiple).double()
    options = {**SMALL, "vocab_size": 100, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return HFTextTower("bert", CONTEXT, 24, pool=kind, options=options, length_multiple=multiple).double()


def texts(kind: str, padding_first: bool = False) -> Tensor:
    """Random words; CLIP's end with token 99, and what follows is anything."""
    ids = torch.randint(5, 98, (len(LENGTHS), CONTEXT), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(LENGTHS):
        if kind == "clip":
            ids[row, length - 1] = 99
        else:
            ids[row, slice(None, CONTEXT - length) if padding_first else slice(length, None)] = 0
    return ids


def note_shapes(model: TextTower | HFTextTower | SiglipTextTower) -> list[tuple[int, ...]]:
    """Of what goes through the transformer from now on."""
    noted: list[tuple[int, ...]] = []
    model.trunk.register_forward_pre_hook(
        lambda _, args, inputs: noted.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return noted


@pytest.fixture(autouse=True)
def calls_cost_nothing(monkeypatch):
    """Else so few texts would be one group."""
    monkeypatch.setattr(text_lengths, "CALL_COST", 0)
    monkeypatch.setattr(text_lengths, "_LEAST_GROUP", 1)


def assert_same(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert (found - expected).abs().max() <= 1e-13 * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("kind", ["clip", "cls", "mean", "last"])
def test_features_and_gradients_are_those_of_padded_texts(kind):
    short, padded = tower(kind), tower(kind, None)
    features = []
    for model, groups in ((short, GROUPS), (padded, [(len(LENGTHS), CONTEXT)])):
        shapes = note_shapes(model)
        features.append(model(texts(kind)))
        features[-1].sin().sum().backward()
        assert sorted(shapes) == groups
    assert_same(*features)
    expected = dict(padded.named_parameters())
    for name, parameter in short.named_parameters():
        gradient, reference = parameter.grad, expected[name].grad
        assert gradient is not None and reference is not None, name
        assert_same(gradient, reference, name)


def test_lengths_may_come_with_the_ids_and_be_cut_with_them():
    model, ids = tower("clip"), texts("clip")
    known = TokenIds(ids, model.measure(ids))
    assert known.lengths.tolist() == list(LENGTHS)
    shapes = note_shapes(model)
    with torch.no_grad():
        parts = torch.cat([model(known[:3]), model(known[3:])])
        assert sorted(shapes) == [(1, 4), (1, 8), (1, 12), (1, 16), (1, 20), (1, 20), (2, 4)]
        assert_same(parts, model(ids))


def test_one_group_is_as_long_as_its_longest_text():
    model, ids = tower("clip"), texts("clip")[:4]
    expected, shapes = model(ids), note_shapes(model)
    model.one_group = True
    assert_same(model(ids), expected)
    assert shapes == [(4, 20)]
    assert model(ids[2:]).shape == (2, 24)
    assert shapes[1:] == [(2, 12)]


def test_few_texts_join_the_next_length_where_a_call_costs_more(monkeypatch):
    model, ids = tower("clip"), texts("clip")
    expected, shapes = model(ids), note_shapes(model)
    for cost, groups in ((3, GROUPS), (4, [(2, 12), (3, 4), (3, 20)]), (12, [(4, 8), (4, 20)])):
        monkeypatch.setattr(text_lengths, "CALL_COST", cost)
        assert_same(model(ids), expected)
        assert sorted(shapes) == groups
        shapes.clear()


def test_padding_that_comes_first_is_left_in():
    model = tower("mean")
    ids = texts("mean", padding_first=True)
    shapes = note_shapes(model)
    assert_same(model(ids), tower("mean", None)(ids))
    assert shapes == [(len(LENGTHS), CONTEXT)]


def test_encoders_that_heed_their_padding_get_it():
    fnet = HFTextTower("fnet", CONTEXT, 24, options={**SMALL, "vocab_size": 100, "pad_token_id": 3}, length_multiple=4)
    assert fnet.length_multiple is None
    assert tower("mean").length_multiple == 4


@pytest.mark.parametrize(("name", "said"), [("fnet", 1), ("bert", 0)])
def test_a_multiple_that_a_tower_cannot_heed_is_said(name, said, caplog):
    options = {**SMALL, "vocab_size": 100, "pad_token_id": 3}
    text = load_config("vit_tiny")["text"] | {"name": name, "options": options, "context_length": CONTEXT}
    with caplog.at_level(logging.INFO):
        make_model(OmegaConf.create({"model": load_config("vit_tiny") | {"text": text}}))
    assert caplog.text.count("model.text.length_multiple=8 says nothing") == said


@pytest.mark.parametrize("name", ["vit_b_16_siglip2", "coca_vit_b_32"])
def test_the_configs_of_towers_that_read_after_the_padding_name_no_multiple(name):
    assert load_config(name)["text"]["length_multiple"] is None


def test_a_text_without_an_end_is_taken_whole():
    model, ids = tower("clip"), texts("clip")
    ids[ids == 99] = 98
    assert model.measure(ids).tolist() == [CONTEXT] * len(LENGTHS)


def test_the_config_says_how_and_siglip_reads_all():
    size: dict[str, Any] = {"width": 32, "layers": 1, "heads": 1, "context_length": CONTEXT, "vocab_size": 100}
    options = {"patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 1}
    vision = {"name": "vit_tiny_patch16_224", "options": options}
    for multiple in (8, None):
        text = {**size, "length_multiple": multiple}
        model = create_dual_encoder(embed_dim=24, image_size=32, vision=vision, text=text)
        assert isinstance(model.text, TextTower) and model.text.length_multiple == multiple
    siglip = SiglipTextTower(32, 1, 1, CONTEXT, 24, 100)
    shapes = note_shapes(siglip)
    siglip(texts("clip"))
    assert shapes == [(len(LENGTHS), CONTEXT)]
    with pytest.raises(ConfigError, match=r"model\.text\.length_multiple=0 is neither null nor"):
        TextConfig.of({"length_multiple": 0})
