"""Training with loss=captioning and clip-caption, by the command line."""

import json
import os
import re

import pytest
from PIL import Image
from safetensors.torch import save_file

from clip_train.checkpoints.folder import list_checkpoints
from tests.cli.runs import TINY, clip_train, train_tiny
from tests.cli.warm_start import run_module
from tests.interop.tiny import CLIP, ours

COCA = [
    "loss=captioning",
    "model.embed_dim=64",
    "model.decoder={layers: 1, heads: 2, attn_pooler_queries: 5, attn_pooler_heads: 2}",
]


def clip_caption(*arguments: str):
    return run_module("clip_train.commands.caption", arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, 300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with validation, with the micro-batch size that fits."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = ["max_steps=2", "micro_batch_size=auto", "ema.decay=0.9", "eval.batch_size=64", "eval.picture=false"]
    train_tiny(folder, "coca", *COCA, *overrides, "data.val.shards=demo:emoji/val_concept/*.tar")
    return folder / "coca"


def test_a_run_validates_and_its_checkpoint_writes_captions(run, tmp_path):
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert 0 <= metrics["val/val_concept/image_to_text_recall@10"] <= 1
    for name in ("b.png", "a.png"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    done = clip_caption(f"weights={checkpoint}", f"images={tmp_path}/*.png", "max_length=8", "num_beams=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    assert lines[0].split("\t")[1] == lines[1].split("\t")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "loss=captioning"], "loss=captioning trains a decoder, and this model has none: take model=coca_"),
        ([*TINY, *COCA[1:]], "loss=contrastive trains no decoder, and this model has one: take loss=captioning, or"),
        ([*TINY, *COCA, "model.init_logit_bias=-1"], "model.init_logit_bias=-1: loss=captioning has no bias"),
        ([*TINY, *COCA, "loss.caption_weight=-1"], "loss.caption_weight=-1 is not a number of at least 0"),
        ([*TINY, *COCA, "+model.decoder.depth=1"], "model.decoder.depth: no such key; there are layers,"),
    ],
)
def test_training_that_cannot_be_is_one_line(tmp_path, arguments, message):
    done = clip_train(*arguments, f"output_dir={tmp_path}", "run_name=run")
    assert done.returncode == 2
    assert re.fullmatch(rf"clip-train: error: {re.escape(message)}.*\n", done.stderr), done.stderr
    assert not any(tmp_path.iterdir())


def test_captions_that_cannot_be_are_one_line(tmp_path):
    save_file(ours(CLIP).state_dict(), tmp_path / "clip.safetensors")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    weights, images = f"weights={tmp_path}/clip.safetensors", f"images={tmp_path}/a.png"
    for arguments, message in (
        ([weights], "images has no value: give images=..."),
        ([weights, f"images={tmp_path}/b.png"], f"images={tmp_path}/b.png: no such picture"),
        ([weights, images], f"{weights}: of which model?"),
        ([weights, images, "generation_type=greedy"], "generation_type=greedy is none of beam_search, top_p, top_k"),
        ([weights, images, "batch_size=0"], "batch_size=0 is not a whole number of at least 1"),
    ):
        done = clip_caption(*arguments)
        assert done.returncode == 2
        assert re.fullmatch(rf"clip-caption: error: {re.escape(message)}.*\n", done.stderr), done.stderr
