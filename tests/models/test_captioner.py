"""CoCa: open_clip's outputs on the same weights, and what a decoder can be joined to."""

import re

import pytest
import torch
from torch.nn import functional as F

from clip_train.errors import ConfigError
from clip_train.interop import open_clip as open_clip_layout
from clip_train.models import create_dual_encoder, decoder
from clip_train.models.captioner import Captioner
from tests.interop.tiny import CLIP, assert_close, clip_ids, ours, pixels
from tests.models.coca import COCA, open_clip_coca, our_coca


def test_embeddings_and_logits_are_open_clips():
    theirs = open_clip_coca().double()  # the logits are large: in fp32 rounding alone moves them by 2e-5
    model = ours(COCA, open_clip_layout.to_ours(theirs.state_dict())).double()
    assert isinstance(model, Captioner)
    images, ids = pixels().double(), clip_ids()[[0, 1, 3]]
    expected = theirs(images, ids)
    assert_close(model.encode_image(images), expected["image_features"])
    assert_close(model.encode_text(ids), expected["text_features"])
    tokens = model.encode_image_tokens(images)
    logits = model.next_token_logits(tokens, ids)
    assert_close(logits[:, :-1], expected["logits"])
    assert_close(model.next_token_logits(tokens, ids[:, :5], last=1)[:, 0], expected["logits"][:, 4])

    image, text, losses, counts = model(images, ids)
    assert_close(image, expected["image_features"])
    assert_close(text, expected["text_features"])
    assert counts.tolist() == (ids[:, 1:] != 0).sum(1).tolist()
    loss = F.cross_entropy(expected["logits"].transpose(1, 2), expected["labels"], ignore_index=0)
    assert_close(losses.sum() / counts.sum(), loss)


def test_losses_are_the_same_in_parts_and_with_checkpointed_blocks(monkeypatch):
    found = []
    for logits_at_once, checkpointing in ((1 << 26, False), (1, "selective"), (5 * 49408, "blocks")):
        monkeypatch.setattr(decoder, "_LOGITS_AT_ONCE", logits_at_once)
        model = our_coca(grad_checkpointing=checkpointing).train()
        image, text, losses, _ = model(pixels(), clip_ids()[:3])
        (losses.sum() + (image * text).sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses.detach(), gradients))
    for losses, gradients in found[1:]:
        torch.testing.assert_close(losses, found[0][0])
        assert gradients.keys() == found[0][1].keys() == dict(our_coca().named_parameters()).keys() - {"logit_scale"}
        for name, gradient in found[0][1].items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * (gradient.norm() + 1), name


def test_it_is_trained_in_bf16():
    model = our_coca().to(torch.bfloat16)
    losses = model(pixels().to(torch.bfloat16), clip_ids()[:3])[2]
    expected = our_coca()(pixels(), clip_ids()[:3])[2]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.1)
    losses.sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if p.grad is not None)
    assert next(model.decoder.parameters()).grad is not None


def test_padding_is_neither_predicted_nor_seen():
    model = ours(COCA)
    short, long = clip_ids()[:1, :10], clip_ids()[:1]
    assert (short == 0).any()
    images = pixels()[:1]
    assert_close(model(images, short)[2], model(images, long)[2])
    empty = torch.tensor([[49406, 49407, 0, 0, 0]])
    assert model(images, empty)[3].item() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"depth": 2}}, "model.decoder.depth: no such key; there are layers, heads, "),
        ({"decoder": {"layers": 0}}, "model.decoder.layers=0 is not a whole number of at least 1"),
        ({"decoder": {"heads": 3}}, "model.decoder.heads=3 does not divide model.text.width=64"),
        ({"decoder": {"attn_pooler_heads": 3}}, "model.decoder.attn_pooler_heads=3 does not divide model.embed_dim=64"),
        ({"embed_dim": 32}, "model.decoder needs model.text.width=64 and model.embed_dim=32 equal"),
        ({"text": {"name": "bert", "width": 64}}, "model.decoder goes with model.text.name=clip and its tokenizer"),
        ({"vision": {"name": "convnext_atto"}}, "model.vision: timm cannot build convnext_atto"),
        ({"vision": {"name": "vit_tiny_patch16_224", "pretrained": True}}, "model.vision.pretrained does not go with"),
    ],
)
def test_what_a_decoder_cannot_be_joined_to(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        create_dual_encoder(**{**COCA, **change})


def test_a_model_without_a_decoder_is_as_before():
    assert not isinstance(ours(CLIP), Captioner)
