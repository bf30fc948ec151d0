"""The number of processes decides how fast a run goes, not what it learns."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from torch import Tensor

from clip_train.checkpoints.folder import read_weights
from tests.cli.runs import train_tiny
from tests.distributed.test_fsdp import metric
from tests.distributed.train_many import train_on

STEPS, BATCH = 4, 48
RANKS = (1, 2, 3, 4)
Way = tuple[int, int | None, str, str]  # ranks, micro-batches per step, exchange, checkpointing of activations
WAYS: list[Way] = list(itertools.product(RANKS, [None, 2, 4], ["gather", "ring"], ["false", "true"]))
REFERENCE, SYNCHRONISED = (1, None, "gather", "false"), [(2, None, "gather", "false"), (2, 4, "gather", "false")]
# Each choice on several ranks; the other combinations are slow.
QUICK: list[Way] = [
    REFERENCE,
    (1, 4, "ring", "true"),
    *SYNCHRONISED,
    (2, None, "ring", "true"),
    (2, 2, "ring", "false"),
    (3, None, "ring", "false"),
    (3, 2, "gather", "true"),
]
EVALUATED = [REFERENCE, SYNCHRONISED[0]]


def train_in(folder: Path, ways: list[Way]) -> dict[Way, Path]:
    """Run folders by way."""
    arguments = {ranks: [] for ranks in RANKS}
    for ranks, micro_batches, exchange, checkpointing in ways:
        micro_batch = "null" if micro_batches is None else -(-BATCH // ranks // micro_batches)
        run = (
            f"{ranks}-{micro_batches}-{exchange}-{checkpointing} batch_size={BATCH} max_steps={STEPS}"
            f" micro_batch_size={micro_batch} loss.exchange={exchange} model.grad_checkpointing={checkpointing}"
        )
        if (ranks, micro_batches, exchange, checkpointing) in EVALUATED:
            run += " data.val.shards=demo:emoji/val_concept/*.tar eval.batch_size=64 eval.picture=false"
        arguments[ranks].append(run)
    for ranks, runs in arguments.items():
        if runs:
            train_on(ranks, folder, *runs)
    return {way: folder / "-".join(map(str, way)) for way in ways}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[Way, Path]:
    return train_in(tmp_path_factory.mktemp("runs"), QUICK)


@pytest.fixture(scope="module")
def all_runs(runs, tmp_path_factory) -> dict[Way, Path]:
    return runs | train_in(tmp_path_factory.mktemp("runs"), [way for way in WAYS if way not in QUICK])


def parameters(run: Path) -> dict[str, Tensor]:
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    return read_weights(checkpoint)


def check(reference: Path, run: Path, ranks: int) -> None:
    expected = metric(reference, "train/loss")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    assert metric(run, "train/loss") == pytest.approx(expected, rel=1e-5)
    # AdamW would hide a constant factor.
    assert metric(run, "train/grad_norm") == pytest.approx(metric(reference, "train/grad_norm"), rel=1e-4)
    found = parameters(run)
    for name, parameter in parameters(reference).items():
        # Key biases have no influence: they start at zero, and rounding alone moves them.
        assert (found[name] - parameter).norm() <= 1e-5 * (parameter.norm() + 1), name
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["samples_seen"]) == (ranks, BATCH * STEPS)


@pytest.mark.parametrize("way", QUICK, ids=str)
def test_losses_and_parameters_do_not_depend_on_how_a_batch_is_computed(runs, way):
    check(runs[REFERENCE], runs[way], ranks=way[0])


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if way not in QUICK], ids=str)
def test_nor_in_any_other_combination(all_runs, way):
    check(all_runs[REFERENCE], all_runs[way], ranks=way[0])


def check_synchronisations(plain_run: Path, cached_run: Path) -> None:
    plain, cached = (json.loads((run / "exchanges.json").read_text()) for run in (plain_run, cached_run))
    assert all(plain)
    assert cached == [0, 0, 0, plain[0], 0, 0, 0, plain[1]]


def test_gradients_are_synchronised_once_per_step(runs):
    check_synchronisations(*(runs[way] for way in SYNCHRONISED))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_gradients_are_synchronised_once_per_step_on_more_ranks(all_runs, ranks):
    check_synchronisations(*(all_runs[ranks, *way[1:]] for way in SYNCHRONISED))


def test_recalls_do_not_depend_on_the_number_of_ranks(runs):
    one, two = (json.loads((runs[way] / "summary.json").read_text())["metrics"] for way in EVALUATED)
    name = "val/val_concept/image_to_text_recall@10"
    assert one[name] == pytest.approx(two[name], abs=2 / 194)  # rounding may swap two neighbours


@pytest.mark.slow
def test_torchrun(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    rows = train_tiny(tmp_path, "torchrun", "max_steps=3", "data.val.shards=null", launcher=launcher)
    alone = train_tiny(tmp_path, "alone", "max_steps=3", "data.val.shards=null")
    assert [float(r["train/loss"]) for r in rows] == pytest.approx([float(r["train/loss"]) for r in alone], rel=1e-5)
    assert json.loads((tmp_path / "torchrun" / "summary.json").read_text())["world_size"] == 2
