"""Every model config builds, with as many parameters as published."""

import re
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn
from transformers import AlignConfig, AlignModel, Dinov2Config, Dinov2Model

from clip_train.models import create_dual_encoder
from tests.models.configs import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
# Millions, as in open_clip's table of models (docs/model_profile.csv) or, for OpenAI's ResNets, from their weights.
PUBLISHED = {
    "vit_b_32": ("ViT-B-32-quickgelu", 151.28),
    "vit_b_16": ("ViT-B-16-quickgelu", 149.62),
    "vit_l_14": ("ViT-L-14-quickgelu", 427.62),
    "vit_l_14_336": ("ViT-L-14-336-quickgelu", 427.94),
    "vit_h_14": ("ViT-H-14", 986.11),
    "vit_g_14": ("ViT-g-14", 1366.68),
    "vit_bigg_14": ("ViT-bigG-14", 2539.57),
    "rn50": ("RN50-quickgelu", 102.01),
    "rn101": ("RN101-quickgelu", 119.69),
    "rn50x4": ("RN50x4-quickgelu", 178.3),
    "vit_b_16_siglip": ("ViT-B-16-SigLIP", 203.16),
    "vit_l_16_siglip": ("ViT-L-16-SigLIP-256", 652.15),
    "vit_so400m_14_siglip": ("ViT-SO400M-14-SigLIP-384", 877.96),
    "vit_b_16_siglip2": ("ViT-B-16-SigLIP2", 375.19),
    "vit_l_16_siglip2": ("ViT-L-16-SigLIP2-256", 881.53),
    "vit_so400m_14_siglip2": ("ViT-SO400M-14-SigLIP2", 1135.46),
    "eva02_b_16": ("EVA02-B-16", 149.69),
    "eva02_l_14": ("EVA02-L-14", 427.76),
    "convnext_base": ("convnext_base", 151.52),
    "coca_vit_b_32": ("coca_ViT-B-32", 253.56),
    "coca_vit_l_14": ("coca_ViT-L-14", 638.45),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_of_config(name: str) -> int:
    with torch.device("meta"):
        return count(create_dual_encoder(**load_config(name)))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_as_many_parameters_as_published(name):
    reference, millions = PUBLISHED[name]
    config = open_clip.get_model_config(reference)
    assert config is not None
    create = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    create = open_clip.CoCa if "multimodal_cfg" in config else create
    with torch.device("meta"):
        expected = count(create(**config))
    assert expected == pytest.approx(millions * 1e6, abs=0.006e6)
    assert count_of_config(name) == expected
    assert f" {expected:,} parameters" in (CONFIGS / f"{name}.yaml").read_text().partition("defaults:")[0]


def test_align_is_kakaos_without_the_pooler_that_it_does_not_use():
    with torch.device("meta"):
        reference = AlignModel(AlignConfig())
    pooler = reference.text_model.pooler
    assert pooler is not None
    assert count(reference) == pytest.approx(172.12e6, abs=0.005e6)
    assert count_of_config("align_base") == count(reference) - count(pooler)


def test_the_image_tower_of_dinov2_is_metas_without_its_mask_token():
    with torch.device("meta"):
        model = create_dual_encoder(**load_config("dinov2_b_14"))
        reference = Dinov2Model(Dinov2Config(image_size=224, patch_size=14))
    assert count(model.vision.trunk) == count(reference) - 768
    assert count(reference) == pytest.approx(86e6, rel=0.01)


def test_every_config_is_described_and_tested():
    names = {path.stem for path in CONFIGS.glob("[!_]*.yaml")}
    assert names == {*PUBLISHED, "vit_tiny", "align_base", "dinov2_b_14"}
    for name in names:
        assert re.match(r"# .*\d", (CONFIGS / f"{name}.yaml").read_text()), name
