"""What classifies, under the step: micro-batches, several ranks, features computed by all ranks."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clip_train.data.class_names import ClassNames
from clip_train.data.feature_batches import FeatureTable, chunk_parts
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.distributed import group_rank
from clip_train.errors import DataError
from clip_train.evaluation.feature_cache import compute_features
from clip_train.losses.classification import ClassificationLoss
from clip_train.models import create_dual_encoder
from clip_train.models.adaptation import adapt
from clip_train.models.classifiers import Task
from clip_train.training.cached_gradients import cached_backward
from clip_train.training.frozen_towers import encoding_once
from tests.evaluation.test_zero_shot import labelled_set
from tests.labelled import make_labelled
from tests.models.test_dual_encoder import TINY, random_batch
from tests.ranks import run_on_ranks

PROMPT = {"method": "prompt", "n_ctx": 4, "csc": False, "init": "a photo of a"}


@pytest.mark.parametrize("conditional", [False, True])
def test_prompts_have_the_same_gradients_in_micro_batches(conditional):
    torch.manual_seed(0)
    task = Task(ClassNames(("apple", "pear", "fig"), ("{}",)), ClipTokenizer(16))
    model = adapt(create_dual_encoder(**TINY), {**PROMPT, "conditional": conditional}, task)
    inputs = (random_batch(5)[0], torch.tensor([0, 1, 2, 2, 1]))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = ClassificationLoss()
    expected = loss(*model(*inputs))
    gradients = torch.autograd.grad(expected, learning)
    top1 = loss.metrics["train/top1"]
    found = cached_backward(
        encoding_once(model),
        loss,
        model.logit_parameters(),
        inputs,
        micro_batch_size=2,
        backward=lambda scalar, last: scalar.backward(),
    )
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss.metrics["train/top1"] == top1
    for parameter, gradient in zip(learning, gradients):
        assert gradient.any() or conditional
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def rank_loss() -> tuple[float, list[float], float]:
    """Loss, gradients of this rank's part, and top-1 of a batch of 4 on two ranks."""
    rank = torch.distributed.get_rank()
    losses = torch.tensor([[1.0, 2.0], [3.0, 6.0]])[rank].requires_grad_()
    loss = ClassificationLoss()
    value = loss(losses, torch.tensor([[1.0, 0.0], [0.0, 0.0]])[rank], logit_scale=torch.tensor(1.0))
    value.backward()
    assert losses.grad is not None
    return value.item(), losses.grad.tolist(), loss.metrics["train/top1"].item()


def test_the_loss_is_the_mean_over_all_ranks():
    # Averaged over the two ranks, each sample's gradient is a quarter.
    assert run_on_ranks(rank_loss, 2) == [(3.0, [0.5, 0.5], 0.25)] * 2


def mean_colours(pattern: str, folder: Path) -> str:
    """Features that are the mean colour of each picture."""
    try:
        compute_features(
            lambda pixels: pixels.float().mean(dim=(2, 3)),
            replace(labelled_set(pattern), keep_bad=True),
            folder,
            batch_size=50,
            num_workers=0,
            autocast=nullcontext,
            device=torch.device("cpu"),
        )
    except DataError as error:
        return str(error)
    return ""


def test_ranks_share_the_work_and_a_bad_sample_is_noted(tmp_path):
    def damage(sample: dict) -> dict:
        return sample | ({"png": b"broken"} if sample["__key__"] == "000300" else {})

    pattern = make_labelled(tmp_path / "set", [200, 200], damage)
    assert len(chunk_parts(400)) == 2
    assert run_on_ranks(mean_colours, 2, pattern, tmp_path / "features") == ["", ""]
    table = FeatureTable.open(tmp_path / "features", 400)
    assert table.labels.tolist() == [-1 if n == 300 else n % 7 for n in range(400)]
    assert [(n, sample.kind, sample.key) for n, sample in table.bad.items()] == [(300, "image_unreadable", "000300")]
    batch = labelled_set(pattern)[[0, 250, 399]]
    assert torch.equal(torch.from_numpy(table.rows([0, 250, 399])), batch["image"].float().mean(dim=(2, 3)))
    second = tmp_path / "features" / "00001.json"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    second.unlink()
    mean_colours(pattern, tmp_path / "features")
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert all((again[path] == times[path]) == path.name.startswith("00000") for path in times)


def test_ranks_that_name_the_features_differently_share_those_of_the_first(tmp_path):
    pattern = make_labelled(tmp_path / "set", [200, 100])
    assert run_on_ranks(mean_colours_under_own_name, 2, pattern, tmp_path) == ["", ""]
    assert not (tmp_path / "features1").exists()
    assert len(list((tmp_path / "features0").glob("*.npy"))) == 2


def mean_colours_under_own_name(pattern: str, folder: Path) -> str:
    return mean_colours(pattern, folder / f"features{group_rank()}")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    pattern = make_labelled(tmp_path / "set", [3])
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "features"
    assert f"features cannot be written to {folder}" in mean_colours(pattern, folder)
