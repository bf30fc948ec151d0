import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from clip_train.checkpoints.folder import list_checkpoints
from clip_train.errors import ConfigError
from clip_train.interop import hugging_face
from clip_train.interop import open_clip as open_clip_layout
from clip_train.interop.loading import load_weights
from clip_train.interop.reading import read_weights
from clip_train.interop.torchscript import is_torchscript
from clip_train.models.positions import resize_image_positions, stretch_text_positions
from tests.checkpoints.states import make_state
from tests.checkpoints.test_folder import save
from tests.interop.tiny import CLIP, SIGLIP, assert_close, assert_equal, open_clip_clip, ours, pixels

IMAGE_POSITIONS, TEXT_POSITIONS = "vision.trunk.pos_embed", "text.trunk.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of a model of ours."""
    return ours(CLIP).state_dict()


def test_archive_of_torchscript_as_openai_publishes_them(tmp_path, monkeypatch):
    theirs = open_clip_clip()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.half()
    torch.jit.script(theirs).save(str(tmp_path / "ViT.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch, "load", None)
    found = read_weights(str(tmp_path / "ViT.pt"), "init_from")
    assert "TorchScript" in found.layout
    assert_equal(open_clip_layout.from_ours(found.tensors), theirs.state_dict())
    assert found.tensors["vision.trunk.blocks.0.mlp.fc1.weight"].dtype == torch.float16

    model = ours(CLIP)
    load_weights(model, found, "init_from=ViT.pt")
    assert model.state_dict()["vision.trunk.blocks.0.mlp.fc1.weight"].dtype == torch.float32
    assert_close(model.encode_image(pixels()), theirs.float().encode_image(pixels(), normalize=True))


class Malicious:
    def __reduce__(self):
        return Path.touch, (self.path,)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_code_is_refused_and_not_run(tmp_path):
    touched = tmp_path / "touched"
    torch.save({"visual.proj": Malicious(touched)}, tmp_path / "plain.pt")
    with open(tmp_path / "bare.bin", "wb") as file:
        pickle.dump(Malicious(touched), file)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", pickle.dumps(Malicious(touched), protocol=2))
        archive.writestr("script/constants.pkl", b"")
    assert is_torchscript(tmp_path / "script.pt") and not is_torchscript(tmp_path / "plain.pt")
    refused = r"refused, as reading it could run code \(it asks for (__builtin__\.)?getattr, which is"
    for name, message in (("plain.pt", refused), ("bare.bin", "cannot be read as weights"), ("script.pt", refused)):
        with pytest.raises(ConfigError, match=rf"^init_from=.*{name}: {message}"):
            read_weights(str(tmp_path / name), "init_from")
    assert not touched.exists()
    pickle.loads((tmp_path / "bare.bin").read_bytes())
    assert touched.exists()  # so the files were dangerous


def test_training_checkpoint_of_open_clip(tmp_path, weights):
    theirs = open_clip_layout.from_ours(weights)
    wrapped = {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": w for name, w in theirs.items()}}
    torch.save({**wrapped, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}, tmp_path / "epoch_3.pt")
    found = read_weights(str(tmp_path / "epoch_3.pt"), "init_from")
    assert_equal(found.tensors, weights)
    assert found.layout == "open_clip's names, a state dict of torch"


def test_folder_of_open_clip_and_of_transformers(tmp_path, weights):
    torch.save(open_clip_layout.from_ours(weights), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert_equal(read_weights(str(tmp_path), "init_from").tensors, weights)
    theirs = hugging_face.from_ours(weights)
    names = sorted(theirs)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, of_part in parts.items():
        save_file({name: theirs[name].contiguous() for name in of_part}, tmp_path / part)
    index = {"weight_map": {name: part for part, of_part in parts.items() for name in of_part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_weights(str(tmp_path), "init_from")  # safetensors come first
    assert found.layout == "Hugging Face's names, in model.safetensors.index.json"
    assert_equal(found.tensors, weights)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002.safetensors, which .* names, is not there$"):
        read_weights(str(tmp_path), "init_from")


def test_a_checkpoint_of_ours(tmp_path):
    state = make_state()
    save(tmp_path / "samples_00000000000064.ckpt", state)
    (checkpoint,) = list_checkpoints(tmp_path)
    found = read_weights(str(checkpoint), "init_from")
    assert found.manifest and found.manifest.samples_seen == 64
    assert len(found.tensors) == len(state["state_dict"])
    assert not any(name.startswith("model.") for name in found.tensors)


def test_an_image_tower_of_timm_fills_the_trunk_alone(tmp_path):
    options = CLIP["vision"]["options"]
    timms = timm.create_model(CLIP["vision"]["name"], img_size=32, num_classes=10, **options)
    save_file(timms.state_dict(), tmp_path / "tower.safetensors")
    model = ours(CLIP)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = read_weights(str(tmp_path / "tower.safetensors"), "init_from", model.vision.trunk.state_dict().keys())
    assert found.layout.startswith("an image tower with timm's names")
    load_weights(model, found, "init_from=tower")
    for name, weight in model.state_dict().items():
        timms_name = name.removeprefix("vision.trunk.")
        expected = timms.state_dict()[timms_name] if name.startswith("vision.trunk.") else before[name]
        assert torch.equal(weight, expected), name


def test_what_is_no_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("These are no weights, however long the text may be.")
    save_file({"colour": torch.ones(2), "shape": torch.ones(2)}, tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("notes.txt", "cannot be read as weights .it is neither safetensors nor a state dict of torch.$"),
        ("other.safetensors", "names such as colour, shape are of no layout that is known here"),
        ("list.pt", "it holds no state dict"),
        ("empty", "the folder has neither manifest.json .* nor any of open_clip_model.safetensors"),
        ("absent.pt", "not there"),
    ):
        with pytest.raises(ConfigError, match=rf"^weights=.*{name}.*({message})") as error:
            read_weights(str(tmp_path / name), "weights")
        assert "\n" not in str(error.value)


def test_a_name_on_the_hub_from_the_cache_and_without(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--laboratory--clip"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    save_file(hugging_face.from_ours(weights), snapshot / "model.safetensors")
    assert_equal(read_weights("hf-hub:laboratory/clip", "init_from").tensors, weights)
    shutil.rmtree(repository)
    with pytest.raises(
        ConfigError, match=r"^init_from=hf-hub:laboratory/clip: the Hub cannot be reached and the cache"
    ):
        read_weights("hf-hub:laboratory/clip", "init_from")
    with pytest.raises(ConfigError, match=r"no such repository"):
        read_weights("hf-hub:a/b/c", "init_from")


def test_differences_are_listed_by_tower(tmp_path, weights):
    changed = {name: weight for name, weight in weights.items() if "blocks.1.mlp" not in name}
    changed["text.projection.weight"] = torch.ones(2, 3)
    changed["text.trunk.extra"] = torch.ones(1)
    del changed["logit_scale"]
    save_file(changed, tmp_path / "changed.safetensors")
    model = ours(CLIP)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        load_weights(model, read_weights(str(tmp_path / "changed.safetensors"), "init_from"), "init_from=X")
    assert str(error.value) == (
        "init_from=X (clip-train's names, safetensors) does not fit the model: logits: 1 missing: logit_scale;"
        " image tower: 4 missing: vision.trunk.blocks.1.mlp.fc1.bias, vision.trunk.blocks.1.mlp.fc1.weight,"
        " vision.trunk.blocks.1.mlp.fc2.bias ...; text tower: 1 unexpected: text.trunk.extra; 1 of another shape:"
        " text.projection.weight is [2, 3], not [32, 64]"
    )
    assert_equal(model.state_dict(), before)


def test_a_bias_that_only_one_side_has(weights, tmp_path):
    siglip = ours(SIGLIP)
    save_file({name: w for name, w in siglip.state_dict().items() if name != "logit_bias"}, tmp_path / "a.safetensors")
    siglip.logit_bias.data.fill_(-3.0)  # pyright: ignore
    load_weights(siglip, read_weights(str(tmp_path / "a.safetensors"), "init_from"), "init_from=a")
    assert siglip.logit_bias == -3.0
    save_file({**weights, "logit_bias": torch.tensor(1.0)}, tmp_path / "b.safetensors")
    model = ours(CLIP)
    load_weights(model, read_weights(str(tmp_path / "b.safetensors"), "init_from"), "init_from=b")
    assert model.logit_bias is None


def test_weights_of_another_family_are_refused(tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    theirs = CLIPModel(CLIPConfig(vision_config=size, text_config={**size, "vocab_size": 49408}))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"image tower: .* missing: .*; text tower: .*"):
        load_weights(ours(SIGLIP), read_weights(str(tmp_path), "init_from"), "init_from=X")


def test_positions_of_another_image_size_and_text_length_are_interpolated(tmp_path, weights, caplog):
    save_file(open_clip_layout.from_ours(weights), tmp_path / "model.safetensors")
    larger = ours({**CLIP, "image_size": 48, "text": {**CLIP["text"], "context_length": 40}})
    with caplog.at_level("INFO"):
        load_weights(larger, read_weights(str(tmp_path), "init_from"), "init_from=X")
    image, text = (larger.state_dict()[name] for name in (IMAGE_POSITIONS, TEXT_POSITIONS))
    expected = resize_image_positions(weights[IMAGE_POSITIONS], (6, 6), 1)
    assert torch.equal(image, expected)
    assert torch.equal(text, stretch_text_positions(weights[TEXT_POSITIONS], 40))
    assert "16 positions of images interpolated to 6 x 6 patches" in caplog.text
    assert "16 positions of texts stretched to 40" in caplog.text


@pytest.mark.parametrize(
    ("file", "config", "quick_gelu"),
    [
        ("open_clip_model.safetensors", {"open_clip_config.json": {"model_cfg": {"embed_dim": 32}}}, False),
        ("open_clip_model.safetensors", {"open_clip_config.json": {"model_cfg": {"quick_gelu": True}}}, True),
        ("model.safetensors", {"config.json": {"model_type": "clip", "text_config": {"hidden_act": "gelu"}}}, False),
        ("model.safetensors", {"config.json": {"model_type": "clip", "text_config": {}}}, True),
        ("model.safetensors", {}, None),
    ],
)
def test_another_activation_is_refused_where_a_config_tells(tmp_path, weights, file, config, quick_gelu):
    save_file(weights, tmp_path / file)
    for name, content in config.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = read_weights(str(tmp_path), "init_from")
    assert found.quick_gelu is quick_gelu
    for ours_has in (False, True):
        model = ours({**CLIP, "quick_gelu": ours_has})
        if quick_gelu in (None, ours_has):
            load_weights(model, found, "init_from=X")
        else:
            remedy = f"give model.quick_gelu={str(quick_gelu).lower()}$"
            with pytest.raises(ConfigError, match=rf"^init_from=X was trained with Q?\w*GELU, .*: {remedy}"):
                load_weights(model, found, "init_from=X")
