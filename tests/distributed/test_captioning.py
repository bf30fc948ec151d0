"""CoCa's loss: the mean over all tokens of the global batch, however it is computed."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.checkpoints.folder import list_checkpoints, read_weights
from clip_train.losses.captioning import CaptioningLoss, mean_token_loss
from tests.distributed.test_fsdp import metric
from tests.distributed.train_many import train_on
from tests.ranks import pool_group

BATCH, STEPS = 24, 4
RUN = (
    f"batch_size={BATCH} max_steps={STEPS} loss=captioning model.embed_dim=32"
    " model.decoder={layers:2,heads:2,attn_pooler_queries:5,attn_pooler_heads:2}"
)
FSDP = "trainer.strategy=fsdp"
WAYS = {
    "2": (2, ""),
    "1-cached": (1, "micro_batch_size=7 model.grad_checkpointing=true"),
    "2-cached": (2, "micro_batch_size=5 loss.exchange=ring"),
    "2-sharded": (2, FSDP),
    "2-sharded-cached": (2, f"{FSDP} micro_batch_size=4 model.grad_checkpointing=selective"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders: of one process with the whole batch, called `1`, and by the names of WAYS."""
    folder = tmp_path_factory.mktemp("runs")
    ways = sorted({"1": (1, ""), **WAYS}.items(), key=lambda way: way[1][0])
    for ranks, of_these in itertools.groupby(ways, key=lambda way: way[1][0]):
        train_on(ranks, folder, *(f"{name} {RUN} {more}" for name, (_, more) in of_these))
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_losses_and_parameters_do_not_depend_on_how_a_batch_is_computed(runs, name):
    expected = metric(runs / "1", "train/loss")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    assert metric(runs / name, "train/loss") == pytest.approx(expected, rel=1e-5)
    assert metric(runs / name, "train/grad_norm") == pytest.approx(metric(runs / "1", "train/grad_norm"), rel=1e-4)
    found, reference = (read_weights(list_checkpoints(runs / run / "checkpoints")[-1]) for run in (name, "1"))
    assert any("decoder" in parameter for parameter in reference)
    for parameter, value in reference.items():
        assert (found[parameter] - value).norm() <= 1e-5 * (value.norm() + 1), parameter
    assert json.loads((runs / name / "summary.json").read_text())["world_size"] == WAYS[name][0]


COUNTS = torch.tensor([3, 1, 0, 5, 2, 7])


def loss_and_gradients(rank: int, ranks: int, mean: bool) -> list[Tensor]:
    """Of the ranks' share of six captions of unequal lengths: the loss and the gradients of what it is of."""
    torch.manual_seed(0)
    features = [F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2)]
    captions = torch.rand(6, dtype=torch.float64) * COUNTS
    mine = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
    inputs = [tensor[mine].clone().requires_grad_() for tensor in (*features, captions)]
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    group = pool_group(ranks)
    if mean:
        loss = mean_token_loss(inputs[2], COUNTS[mine], group)
    else:
        loss = CaptioningLoss(caption_weight=0.7, group=group)(inputs[0], inputs[1], inputs[2], COUNTS[mine], scale)
    wanted = inputs[2:] if mean else [*inputs, scale]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def on_rank(ranks: int, mean: bool) -> list[Tensor]:
    group = pool_group(ranks)
    return loss_and_gradients(torch.distributed.get_rank(group), ranks, mean)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_averaged_gradients_are_those_of_one_process(pool, ranks, mean):
    loss, *expected = loss_and_gradients(0, 1, mean)
    found = pool.run(on_rank, ranks, mean, ranks=ranks)
    for rank_loss, *_ in found:
        torch.testing.assert_close(rank_loss, loss)
    rows = 1 if mean else 3
    for number in range(rows):
        torch.testing.assert_close(torch.cat([gradients[1 + number] for gradients in found]) / ranks, expected[number])
    if not mean:
        torch.testing.assert_close(sum(gradients[-1] for gradients in found) / ranks, expected[-1])


def test_it_is_the_cross_entropy_of_all_tokens_and_the_contrastive_loss():
    loss, gradient = loss_and_gradients(0, 1, mean=True)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / COUNTS.sum().item()))
    nothing = torch.zeros(2, requires_grad=True)
    assert mean_token_loss(nothing, torch.zeros(2, dtype=torch.long)).item() == 0
    assert 0 < loss < 1
