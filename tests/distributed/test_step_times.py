"""Times of a step on two ranks, of which one is slow: what the other waits for is communication."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from clip_train.planning.hardware import Hardware, write_hardware
from clip_train.training.instruments.limits import limit_of
from clip_train.training.instruments.step_times import COMMUNICATION, PARTS
from clip_train.training.instruments.utilisation import count_pair_flops
from clip_train.training.loggers.csv_logger import read_metrics
from tests.distributed.train_many import train_on

SLEEP = 0.2
RUNS = {
    "loss": f"loss._target_=tests.distributed.slow_rank.slow_loss +loss.seconds={SLEEP}",
    "backward": f"loss._target_=tests.distributed.slow_rank.slow_backward +loss.seconds={SLEEP}",
    "micro_batches": f"loss._target_=tests.distributed.slow_rank.slow_loss +loss.seconds={SLEEP} micro_batch_size=4",
    "sharded": f"loss._target_=tests.distributed.slow_rank.slow_loss +loss.seconds={SLEEP} trainer.strategy=fsdp",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_hardware(Hardware("mine", memory=1.0, bf16=1e9, fp32=1e9, link=1.0, network=1.0), folder / "mine.json")
    fixed = f"trainer.hardware={folder}/mine.json max_steps=3 trainer.log_every=1 data.num_workers=0 logger=csv"
    train_on(2, folder, *(f"{name} {overrides} {fixed}" for name, overrides in RUNS.items()))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_rank_that_waits_for_another_is_said_to_communicate(runs, name):
    _, rows = read_metrics(runs / name / "metrics.csv")
    last = [row for row in rows if row["train/loss"]][-1]
    times = {part: float(last[f"train/time/{part}_ms"]) for part in PARTS}
    step = float(last["train/time/step_ms"])
    assert times[COMMUNICATION] == max(times.values()) and times[COMMUNICATION] > 0.8e3 * SLEEP
    assert 0.8 * step <= sum(times.values()) <= step
    assert limit_of(times, step, lag=None) == COMMUNICATION


def test_utilisation_is_of_one_device(runs):
    _, rows = read_metrics(runs / "loss" / "metrics.csv")
    last = [row for row in rows if row["train/loss"]][-1]
    per_pair = 1e9 * float(last["train/mfu"]) / (float(last["train/samples_per_second"]) / 2)
    model: Any = OmegaConf.to_container(OmegaConf.load(runs / "loss" / "config.yaml").model)
    pair = count_pair_flops(model, None)
    assert pair.image < per_pair < pair.of(1, None) < 2 * pair.image  # between no text and the whole context
