"""distill=teacher as it is typed."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import save_file

from clip_train.models import create_dual_encoder
from tests.cli.runs import clip_train
from tests.labelled import make_labelled
from tests.models.configs import load_config

ARGUMENTS = ("trainer.accelerator=cpu", "trainer.precision=32", "batch_size=8", "max_steps=1", "optim.warmup=1")


@pytest.fixture
def weights(tmp_path) -> Path:
    """Of a random vit_tiny, which has a width of 192."""
    save_file(create_dual_encoder(**load_config("vit_tiny")).state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_teacher_named_by_its_config_and_those_that_do_not_fit(weights, make_shards, tmp_path):
    shards = f"data.train.shards={make_shards([16])[0]}"
    run = ("model=vit_tiny", *ARGUMENTS, shards, f"output_dir={tmp_path}", "distill=teacher")
    teacher = (f"distill.weights={weights}", "distill.model=vit_tiny")
    done = clip_train(*run, *teacher, "model.embed_dim=24", "run_name=one", "checkpoint.every=null")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = OmegaConf.load(tmp_path / "one" / "config.yaml")
    assert (kept.distill.model.embed_dim, kept.model.embed_dim) == (192, 24)
    assert "train/distillation_loss" in (tmp_path / "one" / "metrics.csv").read_text()
    labelled = ("finetune=prompt", "finetune.n_ctx=2", f"data.train.shards={make_labelled(tmp_path / 'labelled', [8])}")
    for overrides, message in (
        ((), "distill.weights has no value: give distill.weights=..."),
        ((f"distill.weights={weights}",), f"distill: weights={weights}: of which model?"),
        ((*teacher, "model.image_size=64"), "distill: the teacher's model.image_size is 32, the student's 64"),
        ((*teacher, "model.text.context_length=16"), "the teacher's model.text.context_length is 12, the student's 16"),
        ((*teacher, "distill.loss_weight=-1"), "distill.loss_weight=-1 is not a number of at least 0"),
        ((*teacher, f"init_from={weights}", *labelled), "pictures with texts, finetune=prompt takes image and label"),
        (("distill.weights=absent.pt", "distill.model=vit_tiny"), "distill: weights=absent.pt"),
    ):
        refused = clip_train(*run, *overrides)
        assert refused.returncode == 2, refused.stderr
        assert message in refused.stderr and refused.stderr.count("\n") == 1
