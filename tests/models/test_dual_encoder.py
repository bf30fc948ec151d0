import math
from collections import Counter

import pytest
import torch

from clip_train.errors import ConfigError
from clip_train.models import DualEncoder, create_dual_encoder
from tests.models.configs import load_config

TINY = {
    "embed_dim": 32,
    "image_size": 32,
    "quick_gelu": True,
    "vision": {
        "name": "vit_tiny_patch16_224",
        "options": {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "pre_norm": True},
    },
    "text": {"width": 64, "layers": 2, "heads": 2, "context_length": 16},
}


def random_batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 49000, (count, 16), generator=generator)
    ids[torch.arange(count), 3 + torch.arange(count)] = 49407
    return pixels, ids


def test_unit_vectors_and_initial_scale():
    model = create_dual_encoder(**TINY)
    image, text = model(*random_batch())
    assert torch.allclose(image.norm(dim=1), torch.ones(4))
    assert torch.allclose(text.norm(dim=1), torch.ones(4))
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_bytes_are_normalised_on_the_device():
    model = create_dual_encoder(**TINY).eval()
    pixels, _ = random_batch()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model_mean(), model_std()))
    assert torch.allclose(model.encode_image(pixels), model.encode_image((pixels / 255 - mean) / std), atol=1e-6)


def model_mean() -> list[float]:
    return load_config("vit_b_32")["image_mean"]


def model_std() -> list[float]:
    return load_config("vit_b_32")["image_std"]


def test_what_follows_the_end_token_changes_nothing():
    model = create_dual_encoder(**TINY).eval()
    _, ids = random_batch()
    changed = ids.clone()
    changed[:, 8:] = 5
    assert torch.allclose(model.encode_text(ids), model.encode_text(changed), atol=1e-6)
    changed[:, 1] = 5
    assert not torch.allclose(model.encode_text(ids), model.encode_text(changed), atol=1e-3)


def test_checkpointing_recomputes_every_block_of_both_towers():
    calls: Counter[int] = Counter()
    model = create_dual_encoder(**TINY, grad_checkpointing=True).train()  # as open_clip says "blocks"
    blocks = [*model.vision.trunk.blocks, *model.text.trunk.encoder.layers]  # pyright: ignore
    for number, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda *_, n=number: calls.update([n]))
    image, text = model(*random_batch())
    (image @ text.T).sum().backward()
    assert calls == dict.fromkeys(range(4), 2)


def test_logit_scale_stays_in_fp32_and_in_range():
    model = create_dual_encoder(**TINY).to(torch.bfloat16)
    assert model.logit_scale.dtype == torch.float32
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-7)
    assert {p.dtype for n, p in model.named_parameters() if n != "logit_scale"} == {torch.bfloat16}
    for value, clamped in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(clamped)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "near: vit_tiny_patch16_224"),
        ({"name": "vit_tiny_patch16_224", "options": {"colour": 3}}, "timm cannot build"),
        ({"name": "vit_tiny_patch16_224", "options": {"num_heads": 5}}, "timm cannot build"),
        ({"name": "vit_tiny_patch16_224", "size": 3}, "model.vision.size: no such key"),
        ({"name": "vit_tiny_patch16_224", "proj": "square"}, "proj=square is none of linear, mlp, none"),
        ({"name": "vit_tiny_patch16_224", "proj": "none"}, "features are 192 wide, and model.embed_dim=32"),
        ({"name": "convnext_atto", "patch_dropout": 0.5}, "convnext_atto has no patches to leave out"),
        ({"name": "vit_tiny_patch16_224", "patch_dropout": 1.0}, "patch_dropout=1.0 is a share"),
    ],
)
def test_impossible_towers(vision, message):
    with pytest.raises(ConfigError, match=message):
        create_dual_encoder(**{**TINY, "vision": vision})


def test_any_timm_model():
    model = create_dual_encoder(**{**TINY, "quick_gelu": False, "vision": {"name": "convnext_atto"}})
    assert isinstance(model, DualEncoder)
    assert model.encode_image(random_batch()[0]).shape == (4, 32)
