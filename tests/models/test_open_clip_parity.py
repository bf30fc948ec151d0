"""The same weights give open_clip's embeddings; the same code gives its initial distribution."""

import open_clip
import pytest
import torch

from clip_train.interop.open_clip import to_ours as from_open_clip
from clip_train.models import create_dual_encoder
from tests.models.configs import load_config

CAPTIONS = ["a photo of a cat", "", "an " + "extremely " * 90 + "long caption"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("vit_b_32", "ViT-B-32-quickgelu"),
        pytest.param("vit_b_16", "ViT-B-16-quickgelu", marks=pytest.mark.slow),
        pytest.param("vit_l_14", "ViT-L-14-quickgelu", marks=pytest.mark.slow),
    ],
)
def test_forward_equals_open_clips(config, name):
    torch.manual_seed(0)
    reference = open_clip.create_model(name).eval()
    with torch.device("meta"):
        model = create_dual_encoder(**load_config(config))
    model = model.to_empty(device="cpu").eval()
    settings = load_config(config)
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    model.image_mean.copy_(255 * mean)
    model.image_std.copy_(255 * std)
    position_ids = model.text.trunk.embeddings.get_buffer("position_ids")  # pyright: ignore
    position_ids.copy_(torch.arange(77)[None])  # buffers are no part of the weights
    model.load_state_dict(from_open_clip(reference.state_dict()))

    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    ids = open_clip.get_tokenizer(name)(CAPTIONS)
    with torch.no_grad():
        image, text, _ = reference((pixels / 255 - mean) / std, ids)
        assert (model.encode_image(pixels) - image).abs().max() < 1e-5
        assert (model.encode_text(ids) - text).abs().max() < 1e-5


def test_initialisation_is_distributed_as_open_clips():
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(image_size=32, patch_size=8, width=128, layers=3, head_width=32)
    text = open_clip.CLIPTextCfg(context_length=16, vocab_size=49408, width=96, heads=3, layers=3)
    reference = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    options = {"patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4, "pre_norm": True}
    model = create_dual_encoder(
        embed_dim=64,
        image_size=32,
        quick_gelu=True,
        vision={"name": "vit_base_patch32_clip_224", "options": options},
        text={"width": 96, "layers": 3, "heads": 3, "context_length": 16},
    )
    ours, theirs = model.state_dict(), from_open_clip(reference.state_dict())
    assert {name: w.shape for name, w in ours.items()} == {name: w.shape for name, w in theirs.items()}
    for name, weight in ours.items():
        spread = theirs[name].std().item() if weight.numel() > 1 else 0.0
        tolerance = 5 * spread / weight.numel() ** 0.5
        assert weight.float().mean().item() == pytest.approx(theirs[name].mean().item(), abs=2 * tolerance + 1e-7), name
        if weight.numel() > 1:
            assert weight.std().item() == pytest.approx(spread, abs=tolerance + 1e-7), name
        if spread and weight.numel() > 1000:  # uniform and normal have different tails
            assert (weight.abs().max() / spread).item() == pytest.approx(
                (theirs[name].abs().max() / spread).item(), rel=0.3
            )
