"""The same weights give the embeddings of open_clip or transformers, for every family; few layers, true widths."""

from functools import partial
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AlignConfig, AlignModel

from clip_train.interop.loading import load_weights
from clip_train.interop.open_clip import to_ours as from_open_clip
from clip_train.interop.reading import Weights
from clip_train.models import DualEncoder, create_dual_encoder
from tests.models.align_weights import from_align
from tests.models.configs import load_config

VOCAB = 500
slow = partial(pytest.param, marks=pytest.mark.slow)  # larger than another of its family
SMALL_TEXT = ("model.text.layers=1", f"model.text.vocab_size={VOCAB}")


def reference_of(name: str, vision: dict[str, Any], trunk: dict[str, Any]) -> Any:
    """open_clip's model with one layer of text and a small vocabulary.

    Args:
        vision: entries of its config.
        trunk: arguments for timm, to which open_clip passes none on.
    """
    config = open_clip.get_model_config(name)
    assert config is not None
    config["text_cfg"] |= {"layers": 1, "vocab_size": VOCAB}
    config["vision_cfg"] |= vision
    create = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", partial(timm.create_model, **trunk))
        return create(**config)


def randomise(model: nn.Module) -> nn.Module:
    """So that every weight matters: no gain is one, no bias zero, and the embeddings of two images differ."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim and "logit" not in name:
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1 and tensor.shape[0] > 1:
                tensor.copy_(noise * (tensor.shape[0] / tensor.numel()) ** 0.5)
            else:
                tensor.add_(0.1 * noise.clamp(-2, 2))
    return model.eval()


def settle_batch_norms(model: nn.Module, pixels: Tensor) -> None:
    """Statistics as after training: those of the pictures, or a deep network with random weights returns constants."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(pixels)
    model.eval()


def small(config: str, *overrides: str) -> DualEncoder:
    return create_dual_encoder(**load_config(config, *SMALL_TEXT, *overrides)).eval()


def texts(context_length: int) -> Tensor:
    """Two texts, the last id ending the first early."""
    ids = torch.randint(3, VOCAB - 1, (2, context_length), generator=torch.Generator().manual_seed(1))
    ids[0, 5:] = 0
    ids[0, 5] = ids[1, -1] = VOCAB - 1
    return ids


def assert_same_embeddings(model: DualEncoder, image: Tensor, text: Tensor, pixels: Tensor, ids: Tensor) -> None:
    assert image.std() > 1e-3 and (image[0] - image[1]).abs().max() > 1e-4  # not all alike
    with torch.no_grad():
        assert (model.encode_image(pixels) - image).abs().max() < 1e-5
        assert (model.encode_text(ids) - text).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "name", "size", "vision", "trunk"),
    [
        ("vit_h_14", "ViT-H-14", 224, {"layers": 1}, {"depth": 1}),
        slow("vit_g_14", "ViT-g-14", 224, {"layers": 1}, {"depth": 1}),
        slow("vit_bigg_14", "ViT-bigG-14", 224, {"layers": 1}, {"depth": 1}),
        ("vit_l_14_336", "ViT-L-14-336-quickgelu", 336, {"layers": 1}, {"depth": 1}),
        ("rn50", "RN50-quickgelu", 64, {"image_size": 64}, {}),
        slow("rn101", "RN101-quickgelu", 64, {"image_size": 64}, {}),
        slow("rn50x4", "RN50x4-quickgelu", 96, {"image_size": 96}, {}),
        ("vit_b_16_siglip", "ViT-B-16-SigLIP", 224, {}, {"depth": 1}),
        slow("vit_l_16_siglip", "ViT-L-16-SigLIP-256", 256, {}, {"depth": 1}),
        slow("vit_so400m_14_siglip", "ViT-SO400M-14-SigLIP-384", 384, {}, {"depth": 1}),
        ("vit_b_16_siglip2", "ViT-B-16-SigLIP2", 224, {}, {"depth": 1}),
        slow("vit_l_16_siglip2", "ViT-L-16-SigLIP2-256", 256, {}, {"depth": 1}),
        slow("vit_so400m_14_siglip2", "ViT-SO400M-14-SigLIP2", 224, {}, {"depth": 1}),
        ("eva02_b_16", "EVA02-B-16", 224, {}, {"depth": 1}),
        slow("eva02_l_14", "EVA02-L-14", 224, {}, {"depth": 1}),
        ("convnext_base", "convnext_base", 64, {}, {"depths": [1, 1, 1, 1]}),
    ],
)
def test_embeddings_are_open_clips(config, name, size, vision, trunk):
    reference = randomise(reference_of(name, vision, {} if vision else trunk))
    options = [f"+model.vision.options.{key}={value}" for key, value in trunk.items()]
    model = small(config, f"model.image_size={size}", *options)
    model.load_state_dict(from_open_clip(reference.state_dict()))
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    ids = texts(model.text.trunk.config.max_position_embeddings)
    with torch.no_grad():
        image = reference.encode_image(pixels, normalize=True)  # pyright: ignore[reportCallIssue]
        text = reference.encode_text(ids, normalize=True)  # pyright: ignore[reportCallIssue]
    assert_same_embeddings(model, image, text, pixels, ids)


def test_a_resnet_at_another_image_size_has_its_positions_resized_as_a_picture():
    """open_clip resizes those of vision transformers only, so the reference gets positions that Pillow has resized."""
    old, new = (reference_of("RN50-quickgelu", {"image_size": size}, {}) for size in (96, 160))
    weights = randomise(old).state_dict()
    model = small("rn50", "model.image_size=160")
    load_weights(model, Weights(from_open_clip(weights), "open_clip"), "init_from=rn50.pt")
    positions = weights["visual.attnpool.positional_embedding"]
    assert len(positions) == 1 + 3 * 3
    resized = [
        np.asarray(Image.fromarray(channel).resize((5, 5), Image.Resampling.BICUBIC)).flatten()
        for channel in positions[1:].T.reshape(-1, 3, 3).numpy()
    ]
    patches = torch.from_numpy(np.stack(resized, axis=1))
    new.load_state_dict(weights | {"visual.attnpool.positional_embedding": torch.cat([positions[:1], patches])})
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    ids = texts(77)
    with torch.no_grad():
        image, text = new.eval().encode_image(pixels, normalize=True), new.encode_text(ids, normalize=True)
    assert_same_embeddings(model, image, text, pixels, ids)


def test_embeddings_are_aligns():
    text = {"num_hidden_layers": 1, "vocab_size": VOCAB, "hidden_size": 768}
    reference = AlignModel(AlignConfig(text_config=text))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    settle_batch_norms(randomise(reference).vision_model, pixels)  # pyright: ignore[reportArgumentType]
    options = ("+model.text.options.num_hidden_layers=1", f"+model.text.options.vocab_size={VOCAB}")
    model = small("align_base", *options)
    model.load_state_dict(from_align(reference.state_dict()))
    ids = texts(16)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixels)
    assert_same_embeddings(model, expected.image_embeds, expected.text_embeds, pixels, ids)
