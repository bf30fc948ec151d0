"""Exported folders in the hands of the libraries that they are for."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPModel, PreTrainedTokenizerFast, SiglipModel

from clip_train.data.preprocessing import preprocess
from clip_train.errors import ConfigError
from clip_train.interop.exporting import FORMATS, export
from clip_train.interop.hugging_face_folder import write_hugging_face_folder
from clip_train.interop.model_source import ModelSource
from clip_train.interop.open_clip_folder import model_config
from clip_train.interop.reading import read_weights
from clip_train.models import create_dual_encoder
from tests.interop.tiny import CAPTIONS, CLIP, SIGLIP, assert_close, assert_equal, clip_ids, ours, pixels
from tests.models.configs import load_config

# Of the size of the input; to be resized; to be cropped in the middle, and by an odd number of pixels.
PICTURES = [(32, 32), (64, 64), (57, 41), (42, 32), (35, 32)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "ours.safetensors"
    save_file(ours(CLIP).state_dict(), path)
    return path


def picture(size: tuple[int, int]) -> tuple[Image.Image, bytes]:
    """A smooth one, as photos are, and its PNG."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    channels = [np.sin(rows / 7 + k) * np.cos(columns / 9 - k) for k in range(3)]
    image = Image.fromarray((127 + 120 * np.stack(channels, axis=-1)).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return image, buffer.getvalue()


def our_pixels(png: bytes, config=CLIP) -> torch.Tensor:
    """Normalised, as the model has them."""
    values = torch.from_numpy(preprocess(png, 32, config.get("resize_mode", "shortest")).copy()).permute(2, 0, 1)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return (values / 255 - mean) / std


def test_open_clip_gives_our_embeddings_and_pixels(tmp_path, weights):
    export(str(weights), tmp_path / "model", "open_clip", CLIP)
    name = f"local-dir:{tmp_path / 'model'}"
    loaded: Any = open_clip.create_model_from_pretrained(name)
    theirs, prepare = loaded
    ids = open_clip.get_tokenizer(name)(CAPTIONS)
    assert torch.equal(ids, clip_ids())
    model = ours(CLIP)
    with torch.no_grad():
        assert_close(theirs.eval().encode_text(ids, normalize=True), model.encode_text(ids))
        for size in PICTURES:
            image, png = picture(size)
            assert_close(prepare(image), our_pixels(png))
            found = theirs.encode_image(prepare(image)[None], normalize=True)
            assert_close(found, model.encode_image(our_pixels(png)[None]))
    assert_equal(read_weights(str(tmp_path / "model"), "weights").tensors, model.state_dict())


def test_transformers_gives_our_embeddings_and_pixels(tmp_path, weights):
    export(str(weights), tmp_path / "model", "huggingface", CLIP)
    theirs, processor = AutoModel.from_pretrained(tmp_path / "model"), AutoProcessor.from_pretrained(tmp_path / "model")
    assert isinstance(theirs, CLIPModel)
    images, pngs = zip(*(picture(size) for size in PICTURES))
    texts = {"text": CAPTIONS, "padding": "max_length", "truncation": True}
    inputs = processor(images=list(images), **texts, return_tensors="pt")
    model = ours(CLIP)
    prepared = torch.stack([our_pixels(png) for png in pngs])
    level = 1 / 255 / min(CLIP["image_std"])
    for size, found, expected in zip(PICTURES, inputs["pixel_values"], prepared):
        if min(size) == 32 and max(size) - min(size) != 3:  # nothing to resize, and the middle is a whole pixel
            assert_close(found, expected)
        elif size != (35, 32):
            assert (found - expected).abs().max() < 1.01 * level  # torchvision's resize, where Pillow's is ours
        else:
            assert_close(found[..., 1:], expected[..., :-1])  # the middle is rounded down, where torchvision rounds up
    with torch.no_grad():
        outputs = theirs.eval()(**inputs)
    assert_close(outputs.image_embeds, model.encode_image(inputs["pixel_values"]))
    assert_close(outputs.text_embeds, model.encode_text(clip_ids()))
    assert_close(theirs.logit_scale, model.logit_scale)
    assert_equal(read_weights(str(tmp_path / "model"), "weights").tensors, model.state_dict())


@pytest.fixture
def siglip(tmp_path, monkeypatch) -> dict:
    """Its config, with a tokenizer of a hundred words in the working folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "photo": 3, "cat": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained("tokenizer")
    save_file(ours(SIGLIP).state_dict(), "ours.safetensors")
    return SIGLIP


def test_siglip_in_transformers(tmp_path, siglip):
    export("ours.safetensors", tmp_path / "model", "huggingface", siglip)
    theirs = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert isinstance(theirs, SiglipModel)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    image, png = picture((32, 32))
    inputs = processor(images=[image], text=["a photo"], padding="max_length", return_tensors="pt")
    assert_close(inputs["pixel_values"][0], our_pixels(png, siglip))
    assert inputs["input_ids"].tolist() == [[2, 3, *[0] * 10]]
    model = ours(siglip)
    with torch.no_grad():
        outputs = theirs(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"])
    assert_close(outputs.image_embeds, model.encode_image(inputs["pixel_values"]))
    assert_close(outputs.text_embeds, model.encode_text(inputs["input_ids"]))
    assert_close(theirs.logit_bias[0], model.state_dict()["logit_bias"])
    assert_equal(read_weights(str(tmp_path / "model"), "weights").tensors, model.state_dict())


def test_siglip_in_open_clip(tmp_path, siglip):
    """Of true width, as open_clip makes timm's models without options; one layer of text."""
    text = {**siglip["text"], "width": 768, "layers": 1, "heads": 12}
    vision = {"name": "vit_base_patch16_siglip_224", "proj": "none"}
    config = {**siglip, "embed_dim": 768, "image_size": 224, "vision": vision, "text": text}
    model = ours(config)
    save_file(model.state_dict(), "wide.safetensors")
    export("wide.safetensors", tmp_path / "model", "open_clip", config)
    name = f"local-dir:{tmp_path / 'model'}"
    loaded: Any = open_clip.create_model_from_pretrained(name)
    theirs, prepare = loaded
    ids = open_clip.get_tokenizer(name)(["a photo", "cat"])
    assert ids.tolist() == [[2, 3, *[0] * 10], [4, *[0] * 11]]
    image, _ = picture((224, 224))
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    assert_close(prepare(image), expected)
    with torch.no_grad():
        assert_close(theirs.eval().encode_image(expected[None], normalize=True), model.encode_image(expected[None]))
        assert_close(theirs.encode_text(ids, normalize=True), model.encode_text(ids))
        assert_close(theirs.logit_bias, model.state_dict()["logit_bias"])
    assert_equal(read_weights(str(tmp_path / "model"), "weights").tensors, model.state_dict())


def test_openais_code_gives_our_embeddings(tmp_path, weights):
    export(str(weights), tmp_path / "clip.pt", "openai", CLIP)
    theirs = open_clip.model.build_model_from_openai_state_dict(
        torch.load(tmp_path / "clip.pt", weights_only=True), cast_dtype=torch.float32
    ).float()  # it keeps the weights in fp16
    model = ours(CLIP)
    with torch.no_grad():
        assert (theirs.encode_image(pixels(), normalize=True) - model.encode_image(pixels())).abs().max() < 1e-3
        assert (theirs.encode_text(clip_ids(), normalize=True) - model.encode_text(clip_ids())).abs().max() < 1e-3
    assert_equal(read_weights(str(tmp_path / "clip.pt"), "weights").tensors, model.state_dict())


def test_onnx_with_any_number_at_once(tmp_path, weights):
    export(str(weights), tmp_path / "model", "onnx", CLIP)
    model = ours(CLIP)
    sides = (
        ("image", "pixel_values", pixels(), model.encode_image),
        ("text", "input_ids", clip_ids(), model.encode_text),
    )
    for name, given, inputs, encode in sides:
        tower = onnxruntime.InferenceSession(tmp_path / "model" / f"{name}.onnx")
        for count in (1, 2, len(inputs)):
            (found,) = tower.run([f"{name}_embeds"], {given: inputs[:count].numpy()})
            assert_close(torch.from_numpy(found), encode(inputs[:count]))
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(CAPTIONS, padding="max_length", truncation=True).input_ids
    (found,) = tower.run(["text_embeds"], {"input_ids": np.array(ids)})
    assert_close(torch.from_numpy(found), model.encode_text(clip_ids()))


def test_a_resnet_goes_to_open_clip_and_not_to_transformers(tmp_path):
    config = load_config("rn50")
    with torch.device("meta"):
        source = ModelSource(create_dual_encoder(**config), config, "weights")
    with pytest.raises(
        ConfigError, match=r"^transformers' CLIPModel and SiglipModel have no resnet50_clip: take format="
    ):
        write_hugging_face_folder(source, tmp_path)
    published: Any = open_clip.get_model_config("RN50-quickgelu")
    found = model_config(source)
    defaults = {"head_width": 64}
    assert found["vision_cfg"] == {**published.pop("vision_cfg"), **defaults}
    assert found == {**published, "vision_cfg": found["vision_cfg"]}


@pytest.mark.parametrize(
    ("change", "format", "message"),
    [
        ({"quick_gelu": False}, "openai", "its activation is not QuickGELU: take format=open_clip$"),
        ({"vision": {"name": "convnext_atto"}}, "huggingface", "have no convnext_atto: take format=open_clip"),
        ({"vision": {"name": "convnext_atto"}}, "openai", "its image tower is one of timm|this one has quick_gelu"),
        ({"vision": {**CLIP["vision"], "name": "vit_tiny_patch16_224"}}, "open_clip", "without options, this one has"),
        ({"resize_mode": "longest"}, "huggingface", "have no model.resize_mode=longest"),
        ({}, "safetensor", "format=safetensor is none of safetensors, huggingface, open_clip, onnx, openai$"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path, change, format, message):
    config = {**CLIP, **change}
    save_file(ours(config).state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(ConfigError, match=message):
        export(str(tmp_path / "ours.safetensors"), tmp_path / "out", format, config)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_what_is_there_stays(tmp_path, weights):
    (tmp_path / "kept").mkdir()
    with pytest.raises(ConfigError, match=r"^output=.*kept is there already; give a folder that is not$"):
        export(str(weights), tmp_path / "kept", "huggingface", CLIP)
    with pytest.raises(ConfigError, match=r"of which model\? .* give model=vit_b_32 or so$"):
        export(str(weights), tmp_path / "new", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_safetensors_of_any_layout_have_our_names(tmp_path, weights):
    export(str(weights), tmp_path / "model", "open_clip", CLIP)
    assert "safetensors" in FORMATS
    export(str(tmp_path / "model"), tmp_path / "again.safetensors", "safetensors")
    assert_equal(load_file(tmp_path / "again.safetensors"), load_file(weights))
