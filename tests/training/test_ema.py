"""The average of the weights: its formula, what leaves it alone, and that it is what is evaluated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from clip_train.checkpoints.folder import InvalidCheckpointError, read_checkpoint, read_ema_weights, read_weights
from clip_train.training.optim.ema import WeightAverage
from tests.checkpoints.states import assert_equal, make_state
from tests.checkpoints.test_folder import save

BATCH_SIZE = 4


class Module(nn.Module):
    """What the callback needs of a ClipModule."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).to(dtype)
        self.model[2].requires_grad_(False)
        self.clock = SimpleNamespace(batch_size=BATCH_SIZE)
        self.samples_seen = 0
        self.step_metrics = {"train/grad_norm": torch.tensor(1.0)}

    @property
    def weight(self) -> torch.Tensor:
        return self.model.get_parameter("0.weight").detach()

    def step(self, average: WeightAverage, norm: float = 1.0) -> None:
        """Add 1 to all that is trained, unless the norm says that the step was bad."""
        self.samples_seen += BATCH_SIZE
        self.step_metrics["train/grad_norm"] = torch.tensor(norm)
        if torch.tensor(norm).isfinite():
            with torch.no_grad():
                for parameter in self.model[:2].parameters():
                    parameter += 1
        average.on_train_batch_end(*_arguments(self), None, None, 0)


def _arguments(module: Module) -> tuple[Any, Any]:
    return cast(Any, None), cast(Any, module)


def begin(decay: float, module: Module) -> WeightAverage:
    average = WeightAverage(decay)
    average.on_train_start(*_arguments(module))
    return average


def values(average: WeightAverage) -> dict[str, torch.Tensor]:
    checkpoint: dict[str, Any] = {}
    average.on_save_checkpoint(cast(Any, None), cast(Any, None), checkpoint)
    return {name: tensor.clone() for name, tensor in checkpoint["ema"].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(dtype):
    module = Module(dtype)
    expected = module.weight.float().clone()
    average = begin(0.4, module)
    for step in range(1, 6):
        module.step(average)
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.float()
        torch.testing.assert_close(values(average)["model.0.weight"], expected)
    assert values(average)["model.0.weight"].dtype == torch.float32


def test_what_is_averaged():
    module = Module()
    expected = {f"model.0.{name}" for name in ("weight", "bias")}
    expected |= {f"model.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert values(begin(0.9, module)).keys() == expected


def test_a_bad_step_leaves_it_alone():
    module = Module()
    average = begin(0.5, module)
    module.step(average)
    before = values(average)
    for norm in (float("nan"), float("inf")):
        module.step(average, norm)
        assert_equal(values(average), before)
    module.step(average)
    assert not torch.equal(values(average)["model.0.bias"], before["model.0.bias"])


def test_it_stands_in_for_the_weights_and_gives_them_back():
    module = Module()
    average = begin(0.5, module)
    module.step(average)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with average.in_place_of_weights(cast(Any, module)):
        inside = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert_equal({name: inside[name] for name in values(average)}, values(average))
    assert not torch.equal(inside["model.0.weight"], own["model.0.weight"])
    assert torch.equal(inside["model.2.weight"], own["model.2.weight"])
    assert_equal(dict(module.state_dict()), own)


def test_it_goes_on_from_a_checkpoint():
    module = Module()
    average = begin(0.5, module)
    module.step(average)
    checkpoint: dict[str, Any] = {}
    average.on_save_checkpoint(*_arguments(module), checkpoint)
    again = WeightAverage(0.5)
    again.on_load_checkpoint(*_arguments(module), {"ema": {k: v.clone() for k, v in checkpoint["ema"].items()}})
    again.on_train_start(*_arguments(module))
    assert_equal(values(again), values(average))
    fresh = WeightAverage(0.5)
    fresh.on_load_checkpoint(*_arguments(module), {})  # of a run that kept none
    fresh.on_train_start(*_arguments(module))
    assert torch.equal(values(fresh)["model.0.weight"], module.weight)


def test_checkpoints_with_and_without(tmp_path: Path):
    state = make_state()
    plain = save(tmp_path / "plain.ckpt", state)
    assert "ema" not in read_checkpoint(plain)
    with pytest.raises(InvalidCheckpointError, match=r"the run had no ema.decay"):
        read_ema_weights(plain)
    averages = {"0.weight": state["state_dict"]["0.weight"] + 1}
    averaged = save(tmp_path / "averaged.ckpt", {**state, "ema": averages})
    assert (averaged / "ema.safetensors").exists()
    assert_equal(read_checkpoint(averaged), {**make_state(), "ema": averages})
    assert_equal(read_ema_weights(averaged), {**read_weights(averaged), **averages})
