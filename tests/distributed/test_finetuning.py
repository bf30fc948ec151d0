"""Fine-tuning on two ranks, whole or sharded, learns what one process learns."""

from pathlib import Path

import pytest

from clip_train.checkpoints.folder import list_checkpoints, read_weights
from clip_train.training.loggers.csv_logger import read_metrics
from tests.distributed.train_many import train_on
from tests.labelled import make_labelled

BATCH, STEPS = 16, 3
BASE = f"batch_size={BATCH} optim.warmup=0 checkpoint.every=null"
RUN = f"{BASE} max_steps={STEPS}"
METHODS = {
    "lora": "finetune=lora finetune.rank=2 finetune.use_dora=true",
    "adapter": "finetune=adapter finetune.towers=[image,text] finetune.train_logit_scale=true ema.decay=0.9",
    "lit": "finetune=lit finetune.unlocked_groups=2",
    "locked": "finetune=lit finetune.lock=text model.grad_checkpointing=true",
    "classify": "finetune=lora finetune.rank=2 finetune.classify=true data.caption_key=cls LABELLED",
    "prompt": "finetune=prompt finetune.n_ctx=2 model.grad_checkpointing=true LABELLED",
    "linear_probe": "finetune=linear_probe LABELLED",
}
WAYS = {"ddp": "trainer.strategy=ddp", "fsdp": "trainer.strategy=fsdp micro_batch_size=3"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders `METHOD-one`, and `METHOD-WAY` of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    train_on(1, folder, f"base {BASE} max_steps=1")
    (base,) = list_checkpoints(folder / "base" / "checkpoints")
    labelled = f"data.train.shards={make_labelled(folder / 'labelled', [30, 40])}"
    begin = f"{RUN} init_from={base}"
    methods = {method: keys.replace("LABELLED", labelled) for method, keys in METHODS.items()}
    train_on(1, folder, *(f"{method}-one {begin} {keys}" for method, keys in methods.items()))
    train_on(
        2,
        folder,
        *(f"{method}-{way} {begin} {keys} {how}" for method, keys in methods.items() for way, how in WAYS.items()),
    )
    return folder


def end_of(run: Path) -> dict:
    return read_weights(list_checkpoints(run / "checkpoints")[-1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_what_one_process_learns(runs, method, way):
    one, other = (read_metrics(runs / f"{method}-{name}" / "metrics.csv")[1] for name in ("one", way))
    for column, accuracy in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
        expected = [float(row[column]) for row in one if row[column]]
        assert len(expected) == STEPS
        assert [float(row[column]) for row in other if row[column]] == pytest.approx(expected, rel=accuracy)
    expected, found = end_of(runs / f"{method}-one"), end_of(runs / f"{method}-{way}")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * (value.norm() + 1), name


def test_what_is_frozen_keeps_its_bytes(runs):
    base = end_of(runs / "base")
    for way in WAYS:
        found = end_of(runs / f"locked-{way}")
        for name, weight in base.items():
            frozen = name.startswith("model.text.")
            assert found[name].equal(weight) == frozen, name
    assert all("lora_" in name for name in end_of(runs / "lora-fsdp"))
    sides = {name.split(".")[1] for name in end_of(runs / "adapter-fsdp")}
    assert sides == {"image_adapter", "text_adapter", "logit_scale"}
