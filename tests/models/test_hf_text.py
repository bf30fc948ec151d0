"""Encoders of transformers as text towers, against transformers and open_clip themselves."""

from typing import Any

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, T5Config

from clip_train.errors import ConfigError
from clip_train.models.activation_checkpointing import MODES, NONE, checkpoint_blocks
from clip_train.models.hf_text import HFTextTower, pool_states

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def texts(pad_id: int) -> torch.Tensor:
    ids = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate((12, 7, 2)):
        ids[row, length:] = pad_id
    return ids


def tower(name: str, **settings) -> HFTextTower:
    torch.manual_seed(0)
    return HFTextTower(name, 12, 24, **{"options": SMALL, **settings}).eval()


@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_features_of_bert_are_pooled_without_padding(pool):
    model, ids = tower("bert", pool=pool, proj="linear"), texts(0)
    reference = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
    reference.load_state_dict(model.trunk.state_dict())
    with torch.no_grad():
        for row, length in enumerate((12, 7, 2)):  # each text alone, without padding
            states = reference(ids[row : row + 1, :length]).last_hidden_state[0]
            feature = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pool]
            expected = model.projection.weight @ feature
            assert (model(ids)[row] - expected).abs().max() < 1e-5


def test_padding_may_come_first():
    states = torch.arange(8.0).view(1, 4, 2)
    kept = torch.tensor([[False, False, True, True]])
    assert pool_states(states, kept, "cls").tolist() == [[4, 5]]
    assert pool_states(states, kept, "mean").tolist() == [[5, 6]]
    assert pool_states(states, kept, "last").tolist() == [[6, 7]]


@pytest.mark.parametrize("proj", ["linear", "mlp"])
def test_embeddings_are_open_clips(proj):
    model, ids = tower("roberta", pool="mean", proj=proj), texts(1)
    reference = HFTextEncoder("roberta", 24, RobertaConfig(**SMALL), "mean_pooler", proj).eval()  # pyright: ignore
    reference.transformer.load_state_dict(model.trunk.state_dict(), strict=False)  # open_clip's has a pooler, unused
    reference.proj.load_state_dict(model.projection.state_dict())
    with torch.no_grad():
        assert (model(ids) - reference(ids)).abs().max() < 1e-5


def test_weights_of_a_folder(tmp_path):
    torch.manual_seed(1)
    saved = BertModel(BertConfig(**SMALL))
    saved.save_pretrained(tmp_path)
    model = tower(str(tmp_path), pretrained=True, options={})
    for name, weight in model.trunk.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name
    random, name = tower(str(tmp_path), pretrained=False, options={}), "embeddings.word_embeddings.weight"
    assert not torch.equal(random.trunk.state_dict()[name], saved.state_dict()[name])
    fresh = HFTextTower(str(tmp_path), 12, 24, pretrained=True)
    assert all(module.training for module in fresh.modules())


@pytest.mark.parametrize(
    ("name", "options"), [("bert", SMALL), ("t5", {**SMALL, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2})]
)
def test_every_weight_gets_a_gradient(name, options):
    options = {key: value for key, value in options.items() if name == "bert" or hasattr(T5Config(), key)}
    model = tower(name, options=options).train()
    model(texts(0)).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_checkpointing_changes_no_gradient():
    gradients = []
    for mode in MODES:
        model = tower(
            "bert", options={**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        ).train()
        if mode != NONE:
            checkpoint_blocks(model, mode)
        model(texts(0)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "bert", "pool": "max"}, "pool=max is none of cls, mean, last"),
        ({"name": "bert", "options": {"max_position_embeddings": 8}}, "takes texts up to 8 tokens"),
        ({"name": "bert", "pretrained": True}, "bert is a type and has no weights"),
        ({"name": "gpt2", "options": {}}, "its config has no pad_token_id"),
        ({"name": "bert", "options": {"hidden_size": "wide"}}, "model.text.options"),
        ({"name": "bert", "proj": "none"}, "features are 32 wide, and model.embed_dim=24"),
        ({"name": "/no/such/folder"}, "model.text.name=/no/such/folder: no usable config in a folder of that name"),
    ],
)
def test_impossible_encoders(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        tower(**settings)
    assert "\n" not in str(error.value)


def test_the_encoder_is_the_one_of_transformers():
    assert type(tower("bert").trunk) is type(AutoModel.from_config(BertConfig(**SMALL)))
