"""Layers counted from the input to the projection, whatever the tower."""

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from clip_train.errors import ConfigError
from clip_train.models.layers import hidden_matrices, layer_numbers


def tower(trunk: nn.Module) -> nn.Module:
    return nn.ModuleDict({"trunk": trunk, "projection": nn.Linear(4, 4, bias=False)})


def vision(name: str) -> nn.Module:
    with torch.device("meta"):
        return tower(timm.create_model(name, num_classes=0))


def text() -> nn.Module:
    with torch.device("meta"):
        return tower(BertModel(BertConfig(num_hidden_layers=3)))


VIT, RESNET = "vit_base_patch32_clip_224", "resnet50_clip"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (vision(VIT), {"cls_token": 0, "norm_pre.weight": 0, "blocks.0.norm1.bias": 1, "blocks.11.mlp.fc2.weight": 12}),
        (vision(VIT), {"norm.weight": 13}),
        (vision(RESNET), {"stem.conv1.conv.weight": 0, "stages.3.2.conv3_1x1.conv.weight": 16, "head.q.weight": 17}),
        (text(), {"embeddings.LayerNorm.bias": 0, "encoder.layer.0.output.dense.weight": 1, "pooler.dense.bias": 4}),
    ],
)
def test_numbers(model, expected):
    numbers = layer_numbers(model)
    assert {name: numbers[f"trunk.{name}"] for name in expected} == expected
    assert numbers.keys() == dict(model.named_parameters()).keys()
    assert sorted(set(numbers.values())) == list(range(numbers["projection.weight"] + 1))


def test_without_blocks_there_is_nothing_to_count():
    with pytest.raises(ConfigError, match="Linear has no blocks to count"):
        layer_numbers(tower(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (vision(VIT), {"cls_token", "pos_embed", "patch_embed.proj.weight"}),
        (text(), {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}),
    ],
)
def test_hidden_matrices(model, others):
    hidden = hidden_matrices(model)
    left = {name for name, p in model.named_parameters() if p.ndim > 1 and p not in hidden}
    assert left - {"trunk.pooler.dense.weight"} == {f"trunk.{name}" for name in others} | {"projection.weight"}
    assert all(p.ndim > 1 for p in hidden)
