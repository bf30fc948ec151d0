"""Learning from a teacher: the loss on 1 to 4 ranks against its definition in float64, and runs that do not depend on
how a batch is computed."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_train.checkpoints.folder import list_checkpoints, read_weights
from clip_train.distributed import group_rank
from clip_train.losses import distillation_loss
from tests.distributed.test_fsdp import metric
from tests.distributed.train_many import train_on
from tests.losses import references
from tests.losses.references import KINDS, unit_vectors
from tests.ranks import pool_group

Model = tuple[Tensor, Tensor, Tensor]  # images, texts, scale


def model_of(kind: str, count: int, dim: int, scale: float, seed: int = 0) -> Model:
    image, text = unit_vectors(kind, count, dim, seed)
    return image, text, torch.tensor(scale, dtype=torch.float64)


def share_of(model: Model, ranks: int, dtype) -> Model:
    """What this rank has of the batch, by copies."""
    b, rank = len(model[0]) // ranks, group_rank(pool_group(ranks))
    image, text = (x[rank * b : (rank + 1) * b].to(dtype).clone() for x in model[:2])
    return image, text, model[2].to(dtype).clone()


def on_one_rank(ranks: int, student: Model, teacher: Model, dtype) -> tuple[float, list[Tensor]]:
    """The loss, and this rank's gradients of the student's features and scale."""
    own, target = share_of(student, ranks, dtype), share_of(teacher, ranks, dtype)
    for leaf in own:
        leaf.requires_grad_()
    value = distillation_loss(*own, *target, group=pool_group(ranks))
    value.backward()
    return value.item(), [x.grad.double() for x in own if x.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "b"), [(1, 5), (2, 1), (2, 400), (3, 7), (4, 130)])
def test_equals_the_definition(pool, kind, ranks, b):
    student, teacher = model_of(kind, ranks * b, 7, 14.3), model_of(kind, ranks * b, 11, 60.0, seed=1)
    leaves: Model = tuple(x.clone().requires_grad_() for x in student)  # pyright: ignore[reportAssignmentType]
    expected = references.distillation(*leaves, *teacher)
    expected_grads = torch.autograd.grad(expected, leaves)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        results = pool.run(on_one_rank, ranks, student, teacher, dtype, ranks=ranks)
        assert len({value for value, _ in results}) == 1  # the same on every rank, to the bit
        assert results[0][0] == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
        image, text, scale = zip(*(grads for _, grads in results), strict=True)
        found = (torch.cat(image) / ranks, torch.cat(text) / ranks, torch.stack(scale).mean())
        for grad, wanted in zip(found, expected_grads, strict=True):
            floor = tolerance * (14.3 / (ranks * b) ** 0.5 if wanted.ndim else 1)
            assert (grad - wanted).norm() <= 10 * tolerance * wanted.norm() + floor


BATCH, STEPS = 24, 3
RUN = f"batch_size={BATCH} max_steps={STEPS} model.embed_dim=32"
TEACHER = "model.embed_dim=48"
WAYS = {
    "2": (2, ""),
    "2-cached": (2, "micro_batch_size=5 loss.exchange=ring"),
    "2-sharded": (2, "trainer.strategy=fsdp micro_batch_size=4"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders: the teacher; `plain` without it; `1`, of one process with the whole batch; and those of WAYS."""
    folder = tmp_path_factory.mktemp("runs")
    train_on(1, folder, f"teacher batch_size={BATCH} max_steps=10 {TEACHER}", f"plain {RUN}")
    learning = f"{RUN} distill=teacher distill.weights={last_checkpoint(folder / 'teacher')} distill.loss_weight=2"
    ways = [("1", (1, "")), *sorted(WAYS.items(), key=lambda way: way[1][0])]
    for ranks, of_these in itertools.groupby(ways, key=lambda way: way[1][0]):
        train_on(ranks, folder, *(f"{name} {learning} {more}" for name, (_, more) in of_these))
    return folder


def last_checkpoint(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def test_the_loss_is_the_students_and_its_distance_from_the_teacher(runs):
    total, distance = metric(runs / "1", "train/loss"), metric(runs / "1", "train/distillation_loss")
    assert total[0] - 2 * distance[0] == pytest.approx(metric(runs / "plain", "train/loss")[0], rel=1e-5)
    assert total[-1] < total[0]
    assert json.loads((runs / "1" / "summary.json").read_text())["complete"]


def test_checkpoints_hold_nothing_of_the_teacher(runs):
    with_teacher, without = (read_weights(last_checkpoint(runs / name)) for name in ("1", "plain"))
    assert with_teacher.keys() == without.keys()
    assert any(not torch.equal(with_teacher[name], without[name]) for name in without)
    sizes = [
        sum(file.stat().st_size for file in last_checkpoint(runs / name).rglob("*.safetensors"))
        for name in ("1", "plain")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.parametrize("name", WAYS)
def test_losses_and_parameters_do_not_depend_on_how_a_batch_is_computed(runs, name):
    for what in ("train/loss", "train/distillation_loss", "train/grad_norm"):
        assert metric(runs / name, what) == pytest.approx(metric(runs / "1", what), rel=1e-4)
    found, reference = (read_weights(last_checkpoint(runs / run)) for run in (name, "1"))
    for parameter, value in reference.items():
        assert (found[parameter] - value).norm() <= 1e-5 * (value.norm() + 1), parameter
