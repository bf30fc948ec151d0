"""The published recipes: complete but for the data, as long as they say, and each names its source."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig, OmegaConf

from clip_train.commands.program import config_dir
from clip_train.models.adaptation import adapt
from clip_train.training.config_check import check_config
from clip_train.training.durations import RUN_LENGTH_KEYS, Clock
from clip_train.training.launch import World
from clip_train.training.optim.optimizer import build_optimizer
from clip_train.training.optim.schedule import make_schedule
from clip_train.training.parts import make_loss, make_model, plain
from tests.cli.runs import TINY, clip_train

FOLDER = Path(config_dir()) / "experiment"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "demo")
# In place of what comes from the hub, a tower of the same size without weights.
_BERT_LARGE = "{hidden_size: 1024, num_hidden_layers: 24, num_attention_heads: 16, intermediate_size: 4096}"
WITHOUT_HUB = {
    "lit_l16": (
        "model.vision.pretrained=false",
        "model.text.pretrained=false",
        "model.text.name=bert",
        f"++model.text.options={_BERT_LARGE}",
    )
}
_LENGTH = re.compile(r"([\d,]+) steps of ([\d,]+), ([\d.]+)([MG]) samples seen")
_UNITS = {"M": 10**6, "G": 10**9}


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = compose("train", [f"experiment={name}", "model_name=any", *overrides])
    return cfg


def comments(name: str) -> str:
    """What the file begins with, in one line."""
    lines = (FOLDER / f"{name}.yaml").read_text().partition("defaults:")[0].splitlines()
    return " ".join(line.removeprefix("# ") for line in lines)


def clock_of(cfg: DictConfig) -> Clock:
    return Clock.of_run(cfg.batch_size, 10**8, **{key: cfg[key] for key in RUN_LENGTH_KEYS})


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_data_are_missing_and_every_value_can_be_used(name):
    cfg = composed(name)
    assert OmegaConf.missing_keys(cfg) == {"data.train.shards"}
    cfg.data.train.shards = "any"
    check_config(cfg, World("cpu", devices=8, num_nodes=1, rank=0, environment=LightningEnvironment()))
    clock = clock_of(cfg)
    make_loss(cfg)
    warmup = clock.samples(cfg.optim.warmup, "optim.warmup")
    schedule = make_schedule(plain(cfg.schedule), clock, warmup)
    assert 0 < warmup < clock.total_samples / 5
    assert schedule(warmup) == pytest.approx(1, abs=1e-3)
    assert schedule(clock.total_samples - clock.batch_size) < 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_as_long_as_its_comment_says(name):
    clock = clock_of(composed(name))
    found = _LENGTH.search(comments(name))
    assert found, f"{name} does not say `N steps of B, S samples seen`"
    steps, batch_size = (int(found[number].replace(",", "")) for number in (1, 2))
    assert (steps, batch_size) == (clock.total_samples // clock.batch_size, clock.batch_size)
    decimals = len(found[3].partition(".")[2])
    assert round(clock.total_samples / _UNITS[found[4]], decimals) == float(found[3])


@pytest.mark.parametrize("name", RECIPES)
def test_names_its_source_data_and_expected_accuracy(name):
    text = comments(name)
    assert "Source: " in text and "Data: " in text
    assert re.search(r"Expected.*%.*ImageNet|Expected.*ImageNet.*%", text)
    assert re.search(r"arXiv:\d{4}\.\d{5}|\b[\w-]+/[\w-]+, [\w/.-]+\.(md|py|csv)", text)


@pytest.mark.parametrize("name", RECIPES)
def test_its_model_can_be_built_and_trained(name):
    cfg = composed(name, *WITHOUT_HUB.get(name, ()))
    with torch.device("meta"):
        model = make_model(cfg)
        model = model if cfg.get("finetune") is None else adapt(model, plain(cfg.finetune))
    build_optimizer(model, plain(cfg.optim), fused=False)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_command_prints_a_recipe():
    done = clip_train("experiment=laion400m_b32", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    printed = OmegaConf.create(done.stdout)
    assert (printed.batch_size, printed.max_samples, printed.optim.lr) == (32768, 32 * 407_332_084, 5e-4)
    assert done.stdout.count("???") == 1


def test_the_second_stage_goes_on_from_weights_of_the_first(make_shards, tmp_path):
    shards = f"data.train.shards={make_shards([40])[0]}"
    tower = ("model.vision.name=vit_tiny_patch16_224", "model.text={width: 64, layers: 1, heads: 2}")
    tiny = [argument for argument in TINY if argument.startswith(("trainer.", "eval.", "batch_size="))]
    small = (*tower, *tiny, "max_steps=1", "optim.warmup=1", f"output_dir={tmp_path}", shards)
    done = clip_train("experiment=clipa_b16_stage1", *small, "model.image_size=32", "run_name=one")
    assert done.returncode == 0, done.stdout + done.stderr
    second = ("experiment=clipa_b16_stage2", *small, "model.image_size=64", "run_name=two")
    refused = clip_train(*second)
    assert refused.returncode == 2
    assert "CHECKPOINT_OF_STAGE_1" in refused.stderr and refused.stderr.count("\n") == 1
    (checkpoint,) = (tmp_path / "one" / "checkpoints").glob("*.ckpt")
    done = clip_train(*second, f"init_from={checkpoint}")
    assert done.returncode == 0, done.stdout + done.stderr
