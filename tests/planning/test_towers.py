"""Operations against the published figures, and every config can be counted."""

from functools import cache

import pytest

from clip_train.errors import ConfigError
from clip_train.models.float8 import float8_layers
from clip_train.planning.towers import Flops, PlannedModel
from tests.models.configs import load_config
from tests.models.test_dual_encoder import TINY

# Billions per sample, image and text, as in open_clip's docs/model_profile.csv (multiplications and additions).
PUBLISHED = {
    "vit_b_32": (8.82, 5.96),
    "vit_l_14": (162.03, 13.30),
    "convnext_base": (30.72, 5.96),
}


OTHERS = ["align_base", "eva02_b_16", "dinov2_b_14", "rn50x4", "vit_so400m_14_siglip2", "vit_bigg_14"]


@cache
def whole(name: str) -> Flops:
    """Of a pair with a text of the whole context."""
    return PlannedModel(load_config(name)).count_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_are_the_published_ones(name):
    flops = whole(name)
    image, text = PUBLISHED[name]
    assert flops.forward["vision"] == pytest.approx(image * 1e9, rel=0.002)
    assert flops.forward["text"] == pytest.approx(text * 1e9, rel=0.002)
    # Backward is two products for each of forward, but for the patches, whose pixels get no gradient.
    assert flops.training == pytest.approx(3 * flops.forward_total, rel=0.02)


@pytest.mark.parametrize(
    "name",
    ["vit_b_16_siglip", "rn50", "coca_vit_b_32", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)],
)
def test_every_family_can_be_counted_in_bf16(name):
    planned = PlannedModel(load_config(name), precision="bf16-mixed")
    flops = planned.count_flops(tokens=16)
    recomputed = 0.04 if name == "coca_vit_b_32" else 0.0  # the logits, always
    assert flops.training == pytest.approx((3 + recomputed) * flops.forward_total, rel=0.04)
    assert all(flops.forward[part] > 0 for part in planned.parts)


@pytest.mark.parametrize(("mode", "forwards"), [("blocks", 2 / 3), ("selective", 0)])
def test_computing_blocks_again_costs_a_forward_but_for_what_nothing_needs(mode, forwards):
    """A block's last product, a third of it, gives only what the next one has kept; selective makes none again."""
    before = whole("vit_b_32")
    after = PlannedModel(load_config("vit_b_32") | {"grad_checkpointing": mode}).count_flops()
    assert after.forward == before.forward
    recomputed = (after.training - before.training) / before.forward_total
    assert recomputed == pytest.approx(forwards, abs=0.02 if forwards else 0.0)


def test_a_short_text_takes_its_share_of_the_context():
    planned = PlannedModel(load_config("vit_b_32"))
    assert planned.typical_tokens(13) == 16
    short = planned.count_flops(planned.typical_tokens(13)).forward
    assert short["vision"] == whole("vit_b_32").forward["vision"]
    assert short["text"] < whole("vit_b_32").forward["text"] * 17 / 77
    assert PlannedModel(load_config("vit_b_16_siglip")).typical_tokens(13) == 64  # reads after the padding


def test_a_locked_tower_has_no_backward():
    locked = PlannedModel(
        load_config("vit_b_32"), {"method": "lit", "lock": "image", "unlocked_groups": 0, "freeze_bn_stats": True}
    ).count_flops()
    assert locked.training == pytest.approx(locked.forward["vision"] + 3 * locked.forward["text"], rel=0.02)


def test_float8_is_the_linear_layers_of_blocks():
    planned = PlannedModel(TINY)
    flops = planned.count_flops(float8=float8_layers(planned.model))
    layers, width = 2, 64
    assert flops.float8 == pytest.approx(layers * 24 * width**2 * (5 + 16))  # tokens of a picture and of a text
    locked = PlannedModel(TINY, {"method": "lit", "lock": "image", "unlocked_groups": 0, "freeze_bn_stats": True})
    assert locked.count_flops(float8=float8_layers(locked.model)).float8 == pytest.approx(layers * 24 * width**2 * 16)


def test_a_method_that_needs_classes_is_refused():
    with pytest.raises(ConfigError, match="finetune=linear_probe needs the data's classes"):
        PlannedModel(load_config("vit_tiny"), {"method": "linear_probe"})
