"""train/mfu against operations reckoned by hand, and where there is none."""

import logging

import numpy as np
import pytest
import torch

from clip_train.errors import ConfigError
from clip_train.planning.hardware import TABLE, Hardware, known_gpu, write_hardware
from clip_train.planning.towers import PlannedModel
from clip_train.training.instruments.utilisation import Utilisation, count_pair_flops
from tests.models.configs import load_config
from tests.models.test_dual_encoder import TINY
from tests.training.test_module import BATCH_SIZE, train
from tests.training.test_step_times import train_metrics

LOCKED_IMAGE = {"method": "lit", "lock": "image", "unlocked_groups": 0, "freeze_bn_stats": True}
LOCKED_BUT_ONE = {**LOCKED_IMAGE, "unlocked_groups": 2}
RATE = 1e12


def transformer(tokens: int, width: int = 64, layers: int = 2) -> float:
    """Operations forward: twelve products of width x width for each token, and two of tokens with tokens."""
    return layers * (2 * 12 * width**2 * tokens + 4 * width * tokens**2)


def text_forward(tokens: int) -> float:
    return transformer(tokens) + 2 * 64 * 32


IMAGE_FORWARD = 4 * 2 * (3 * 16 * 16) * 64 + transformer(5) + 2 * 64 * 32


def test_a_pair_costs_three_times_forward_of_its_own_tokens():
    pair = count_pair_flops({**TINY, "grad_checkpointing": True}, None)
    assert pair.image == pytest.approx(3 * IMAGE_FORWARD)
    for lengths in ([4], [5, 6, 7], [16, 1]):
        expected = 3 * sum(IMAGE_FORWARD + text_forward(length) for length in lengths)
        assert pair.of(len(lengths), torch.tensor(lengths).numpy()) == pytest.approx(expected)
    assert pair.of(2, None) == pytest.approx(2 * 3 * (IMAGE_FORWARD + text_forward(16)))


def test_what_does_not_learn_costs_less():
    assert count_pair_flops(TINY, LOCKED_IMAGE).image == pytest.approx(IMAGE_FORWARD)
    some = count_pair_flops(TINY, LOCKED_BUT_ONE)
    assert 1.1 * IMAGE_FORWARD < some.image < 2.5 * IMAGE_FORWARD
    assert some.text == count_pair_flops(TINY, None).text


def test_convolutions_in_groups_cost_backward_what_they_cost_forward():
    config = {**TINY, "image_size": 64, "vision": {"name": "convnext_atto"}}
    forward = PlannedModel(config).count_flops().forward["vision"]
    assert count_pair_flops(config, None).image == pytest.approx(3 * forward)
    assert forward < count_pair_flops(config, {**LOCKED_IMAGE, "unlocked_groups": 8}).image < 3 * forward


# Forward, in billions: open_clip's docs/model_profile.csv.
@pytest.mark.parametrize(("name", "published"), [("vit_b_16_siglip", 46.44), ("coca_vit_b_32", 33.34)])
def test_a_model_whose_texts_are_of_one_length_costs_three_times_what_is_published(name, published):
    pair = count_pair_flops(load_config(name), None)
    assert pair.of(3, None) == pytest.approx(3 * 3 * published * 1e9, rel=0.01)
    assert pair.of(3, np.array([5, 6, 7])) == pair.of(3, None)


def hardware_file(folder):
    """As `clip-plan calibrate` writes it."""
    path = folder / "hardware.json"
    write_hardware(Hardware("mine", memory=1.0, bf16=9e99, fp32=RATE, link=1.0, network=1.0), path)
    return str(path)


def test_a_calibrated_processor_has_a_utilisation(tmp_path):
    metrics = train_metrics(Utilisation(TINY, None, hardware_file(tmp_path)))
    train("32", 3, tmp_path, callbacks=[metrics])
    lengths = [4, 5, 6, 7]  # of the batch's texts
    per_pair = 3 * sum(IMAGE_FORWARD + text_forward(length) for length in lengths) / BATCH_SIZE
    latest = metrics.latest
    assert latest["train/mfu"] == pytest.approx(per_pair * latest["train/samples_per_second"] / RATE)


def test_counting_draws_no_random_numbers():
    torch.manual_seed(0)
    count_pair_flops(TINY, None)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_without_a_rate_there_is_none_and_the_log_says_what_to_do(tmp_path, caplog):
    metrics = train_metrics(Utilisation(TINY, None, None))
    with caplog.at_level(logging.INFO):
        train("32", 3, tmp_path, callbacks=[metrics])
    assert "train/mfu" not in metrics.latest
    assert caplog.text.count("no train/mfu: give trainer.hardware=FILE that `clip-plan calibrate` wrote") == 1


def test_a_model_that_needs_its_data_has_none(tmp_path, caplog):
    metrics = train_metrics(Utilisation(TINY, {"method": "linear_probe"}, hardware_file(tmp_path)))
    with caplog.at_level(logging.INFO):
        train("32", 2, tmp_path, callbacks=[metrics])
    assert "train/mfu" not in metrics.latest
    assert "no train/mfu: finetune=linear_probe needs the data's classes" in caplog.text


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        ("h1000", "trainer.hardware=h1000 is unknown; did you mean h100?"),
        ("none.json", "trainer.hardware=none.json: No such file"),
    ],
)
def test_a_wrong_name_is_refused(hardware, said):
    with pytest.raises(ConfigError) as caught:
        Utilisation(TINY, None, hardware)
    assert str(caught.value).startswith(said)


# What drivers say, from nvidia-smi.
GPUS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA H100 PCIe": None,  # three quarters of the rate
    "NVIDIA H200 NVL": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "Tesla V100-SXM2-16GB": None,
}


@pytest.mark.parametrize(("name", "key"), GPUS.items())
def test_a_gpu_goes_by_its_own_name_only(name, key):
    assert known_gpu(name) == (None if key is None else TABLE[key])
