"""CoCa's weights in open_clip's layout and folder, and back."""

from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clip_train.errors import ConfigError
from clip_train.interop import open_clip as open_clip_layout
from clip_train.interop.exporting import export
from clip_train.interop.loading import load_weights
from clip_train.interop.reading import read_weights
from clip_train.models import create_dual_encoder
from clip_train.models.captioner import Captioner
from tests.interop.tiny import CLIP, assert_close, assert_equal, clip_ids, ours, pixels
from tests.models.coca import COCA, open_clip_coca
from tests.models.configs import load_config


def test_there_and_back_to_the_bit():
    theirs = open_clip_coca().state_dict()
    weights = open_clip_layout.to_ours(theirs)
    assert weights.keys() == ours(COCA).state_dict().keys()
    assert_equal(open_clip_layout.from_ours(weights), theirs)


@pytest.mark.parametrize(("config", "name"), [("coca_vit_b_32", "coca_ViT-B-32"), ("coca_vit_l_14", "coca_ViT-L-14")])
def test_names_and_shapes_are_open_clips(config, name):
    with torch.device("meta"):
        weights = create_dual_encoder(**load_config(config)).state_dict()
        reference = open_clip.create_model(name, device="meta").state_dict()
    assert {n: w.shape for n, w in open_clip_layout.from_ours(weights).items()} == {
        n: w.shape for n, w in reference.items()
    }


def test_open_clip_loads_the_folder(tmp_path):
    config = {**COCA, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.25]}
    model = ours(config)
    assert isinstance(model, Captioner)
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    export(str(tmp_path / "ours.safetensors"), tmp_path / "folder", "open_clip", config)
    loaded: Any = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'folder'}")
    theirs = loaded[0].double().eval()
    assert isinstance(theirs, open_clip.CoCa)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'folder'}")(["a photo of a cat", "a dog"])
    assert torch.equal(ids, clip_ids()[:0].new_tensor(ids.tolist())) and ids.shape == (2, 16)
    model, images = model.double(), pixels()[:2].double()
    with torch.no_grad():
        expected = theirs(images, ids)
    assert_close(model.encode_image(images), expected["image_features"])
    assert_close(model.encode_text(ids), expected["text_features"])
    assert_close(model.next_token_logits(model.encode_image_tokens(images), ids)[:, :-1], expected["logits"])
    assert_equal(read_weights(str(tmp_path / "folder"), "weights").tensors, ours(config).state_dict())


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("huggingface", "^transformers has no CoCa: take format=open_clip"),
        ("openai", "^OpenAI's code cannot make this model, as its text tower is not CLIP's"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, format, message):
    save_file(ours(COCA).state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(ConfigError, match=message):
        export(str(tmp_path / "ours.safetensors"), tmp_path / "out", format, COCA)


def test_weights_without_a_decoder_are_refused_by_tower(tmp_path):
    save_file(ours(CLIP).state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(ConfigError, match=r"decoder: .*missing"):
        load_weights(ours(COCA), read_weights(str(tmp_path / "clip.safetensors"), "weights"), "init_from=clip")


def test_longer_texts_keep_the_position_of_the_token_at_the_end(tmp_path):
    save_file(ours(COCA).state_dict(), tmp_path / "short.safetensors")
    model = ours({**COCA, "text": {**COCA["text"], "context_length": 40}})
    load_weights(model, read_weights(str(tmp_path / "short.safetensors"), "weights"), "init_from=short")
    name = "text.trunk.embeddings.position_embedding.weight"
    found, before = model.state_dict()[name], ours(COCA).state_dict()[name]
    assert len(found) == 41
    assert torch.equal(found[-1], before[-1]) and torch.equal(found[0], before[0])


def test_both_towers_as_onnx(tmp_path):
    import onnxruntime

    model = ours(COCA)
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    config = {**COCA, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    export(str(tmp_path / "ours.safetensors"), tmp_path / "onnx", "onnx", config)
    for name, inputs, encode in (
        ("image", {"pixel_values": pixels()}, model.encode_image),
        ("text", {"input_ids": clip_ids()}, model.encode_text),
    ):
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx")
        (found,) = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        assert_close(torch.from_numpy(found), encode(*inputs.values()))
