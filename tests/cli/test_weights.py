"""Weights of other programs in, trained, and out again, by the command line."""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from clip_train.checkpoints.folder import list_checkpoints, read_weights
from clip_train.interop import open_clip as open_clip_layout
from tests.cli.runs import clip_train
from tests.cli.warm_start import run_module
from tests.interop.tiny import CLIP, assert_close, assert_equal, open_clip_clip, ours, pixels

MODEL = [
    "model=vit_b_32",
    "model.embed_dim=32",
    "model.image_size=32",
    "+model.vision.options={patch_size: 8, embed_dim: 128, depth: 2, num_heads: 2}",
    "model.text.width=64",
    "model.text.layers=2",
    "model.text.heads=1",
    "model.text.context_length=16",
]
RUN = [
    *MODEL,
    "experiment=demo",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "batch_size=16",
    "max_steps=1",
    "optim.lr=0",
    "optim.weight_decay=0",
    "data.num_workers=0",
    "data.val.shards=null",
    "eval.every=null",
]


def clip_export(*arguments: str):
    return run_module("clip_train.commands.export", arguments, {**os.environ}, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run from a training checkpoint of open_clip, that changes nothing but the count of samples."""
    folder = tmp_path_factory.mktemp("run")
    theirs = open_clip_clip().state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": w for name, w in theirs.items()}}, folder / "epoch_1.pt")
    done = clip_train(*RUN, f"output_dir={folder}", "run_name=run", f"init_from={folder / 'epoch_1.pt'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch_1.pt: open_clip's names, a state dict of torch, 70 weights" in done.stdout
    return folder / "run"


def test_a_run_starts_from_weights_of_open_clip(run):
    found = read_weights(list_checkpoints(run / "checkpoints")[0])
    expected = open_clip_layout.to_ours(open_clip_clip().state_dict())
    assert_equal({name.removeprefix("model."): weight for name, weight in found.items()}, expected)


def test_exported_to_transformers_and_back(tmp_path, run):
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    done = clip_export(f"weights={checkpoint}", f"output={tmp_path / 'hf'}", "format=huggingface")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote README.md, config.json, model.safetensors")
    model = ours(CLIP, open_clip_layout.to_ours(open_clip_clip().state_dict()))
    with torch.no_grad():
        features = AutoModel.from_pretrained(tmp_path / "hf").get_image_features(pixels()).pooler_output
    assert_close(torch.nn.functional.normalize(features), model.encode_image(pixels()))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "- samples seen: 16\n" in card and "batch size: 16" in card and "AutoProcessor.from_pretrained" in card
    assert "samples in the data set: 6" in card

    done = clip_train(*RUN, f"output_dir={tmp_path}", "run_name=again", f"init_from={tmp_path / 'hf'}")
    assert done.returncode == 0, done.stderr
    again = read_weights(list_checkpoints(tmp_path / "again" / "checkpoints")[0])
    assert_equal(again, read_weights(checkpoint))


def test_weights_of_others_are_exported_with_a_model(tmp_path, run):
    weights = f"weights={run.parent / 'epoch_1.pt'}"
    done = clip_export(weights, f"output={tmp_path / 'open_clip'}", "format=open_clip", *MODEL)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "open_clip" / "open_clip_model.safetensors")
    assert_equal(found, open_clip_clip().state_dict())
    done = clip_export(weights, f"output={tmp_path / 'other'}", "format=open_clip", "model=vit_b_16")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "does not fit the model: logits" in done.stderr or "does not fit the model: image tower: " in done.stderr
    assert not (tmp_path / "other").exists()


def test_a_name_on_the_hub_without_a_network(tmp_path):
    done = clip_train(
        *RUN,
        f"output_dir={tmp_path}",
        "run_name=run",
        "init_from=hf-hub:nobody/nothing",
        launcher=(sys.executable,),
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=str(tmp_path),
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "init_from=hf-hub:nobody/nothing: the Hub cannot be reached and the cache has no copy" in done.stderr
    assert not (tmp_path / "run").exists()
