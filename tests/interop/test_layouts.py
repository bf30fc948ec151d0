"""Each layout and back to the bit, and the same embeddings on both sides."""

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from clip_train.interop import hugging_face, openai
from clip_train.interop import open_clip as open_clip_layout
from clip_train.models import create_dual_encoder
from tests.interop.tiny import (
    CLIP,
    SIGLIP,
    assert_close,
    assert_equal,
    clip_ids,
    make_random,
    open_clip_clip,
    ours,
    pixels,
)
from tests.models.configs import load_config


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip(custom_text):
    theirs = open_clip_clip(custom_text)
    weights = open_clip_layout.to_ours(theirs.state_dict())
    assert_equal(open_clip_layout.from_ours(weights, custom_text), theirs.state_dict())
    model = ours(CLIP, weights)
    assert_close(model.encode_image(pixels()), theirs.encode_image(pixels(), normalize=True))
    assert_close(model.encode_text(clip_ids()), theirs.encode_text(clip_ids(), normalize=True))


def test_openai_is_open_clip_and_three_numbers():
    weights = ours(CLIP).state_dict()
    theirs = openai.from_ours(weights, image_size=32)
    assert {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}.items() <= {
        name: int(value) for name, value in theirs.items() if value.ndim == 0 and name != "logit_scale"
    }.items()
    assert_equal(open_clip_layout.to_ours(theirs), weights)


def test_resnet():
    text = open_clip.CLIPTextCfg(context_length=16, width=64, heads=1, layers=1)
    vision = open_clip.CLIPVisionCfg(image_size=64, layers=(1, 2, 1, 1), width=16)
    theirs = open_clip.CLIP(32, vision, text, quick_gelu=True)
    make_random(theirs)
    theirs.eval().requires_grad_(False)
    weights = open_clip_layout.to_ours(theirs.state_dict())
    assert_equal(open_clip_layout.from_ours(weights), theirs.state_dict())
    with torch.device("meta"):  # timm has no ResNet that small; of its smallest, the names that both have
        timms = create_dual_encoder(**load_config("rn50")).state_dict()
    assert {name for name in weights if name.startswith("vision.")} <= timms.keys()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("rn50", "RN50-quickgelu"),
        ("eva02_b_16", "EVA02-B-16"),
        ("convnext_base", "convnext_base"),
        ("vit_b_16_siglip", "ViT-B-16-SigLIP"),
    ],
)
def test_names_and_shapes_of_larger_models_are_open_clips(config, name):
    with torch.device("meta"):
        weights = create_dual_encoder(**load_config(config)).state_dict()
        reference = open_clip.create_model(name, device="meta").state_dict()
    custom_text = "text.positional_embedding" in reference
    there, back = open_clip_layout.from_ours(weights, custom_text), open_clip_layout.to_ours(reference)
    for found, expected in ((there, reference), (back, weights)):
        assert {n: w.shape for n, w in found.items()} == {n: w.shape for n, w in expected.items()}


def test_text_encoder_of_transformers_in_open_clip():
    theirs = {
        "visual.trunk.stem.0.weight": torch.ones(2),
        "visual.head.mlp.fc1.weight": torch.ones(3),
        "visual.head.mlp.fc2.weight": torch.ones(4),
        "text.transformer.encoder.layer.0.output.dense.weight": torch.ones(5),
        "text.proj.0.weight": torch.ones(6),
        "text.proj.2.weight": torch.ones(7),
        "logit_scale": torch.tensor(1.0),
    }
    weights = open_clip_layout.to_ours(theirs)
    assert weights.keys() == {
        "vision.trunk.stem.0.weight",
        "vision.projection.0.weight",
        "vision.projection.2.weight",
        "text.trunk.encoder.layer.0.output.dense.weight",
        "text.projection.0.weight",
        "text.projection.2.weight",
        "logit_scale",
    }
    assert_equal(open_clip_layout.from_ours(weights), theirs)


def hugging_face_size(heads: int, width: int, **more) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        **more,
    }


def test_hugging_face_clip():
    picture = {"image_size": 32, "patch_size": 8}
    special = {"bos_token_id": 49406, "eos_token_id": 49407}
    theirs = CLIPModel(
        CLIPConfig(
            text_config=hugging_face_size(1, 64, max_position_embeddings=16, vocab_size=49408, **special),
            vision_config=hugging_face_size(2, 128, **picture),
            projection_dim=32,
        )
    )
    make_random(theirs)
    theirs.eval().requires_grad_(False)
    weights = hugging_face.to_ours(theirs.state_dict())
    assert_equal(hugging_face.from_ours(weights), theirs.state_dict())
    assert_embeddings_equal(CLIP, weights, theirs, clip_ids())


def test_hugging_face_siglip():
    act = {"hidden_act": "gelu"}
    theirs = SiglipModel(
        SiglipConfig(
            text_config=hugging_face_size(2, 64, max_position_embeddings=12, vocab_size=99, projection_size=64, **act),
            vision_config=hugging_face_size(2, 64, image_size=32, patch_size=8, **act),
        )
    )
    make_random(theirs)
    theirs.eval().requires_grad_(False)
    weights = hugging_face.to_ours(theirs.state_dict())
    assert_equal(hugging_face.from_ours(weights), theirs.state_dict())
    assert_embeddings_equal(SIGLIP, weights, theirs, torch.randint(0, 99, (4, 12)))


def assert_embeddings_equal(config, weights, theirs, ids):
    model = ours(config, weights)
    outputs = theirs(pixel_values=pixels(), input_ids=ids)
    assert_close(model.encode_image(pixels()), outputs.image_embeds)
    assert_close(model.encode_text(ids), outputs.text_embeds)
