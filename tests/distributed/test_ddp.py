"""What DDP is told: that the graph is static, where it is, and how much of the gradient travels at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_train.checkpoints.folder import list_checkpoints, verify
from clip_train.models import create_dual_encoder
from clip_train.training.strategy import graph_is_static
from tests.distributed.test_fsdp import metric
from tests.distributed.train_many import train_on
from tests.models.test_dual_encoder import TINY

STEPS, BATCH, HALF = 4, 16, 2
RUN = (
    f"batch_size={BATCH} max_steps={STEPS} trainer.log_every=1 checkpoint.every={HALF} checkpoint.keep=2"
    " loss._target_=tests.training.odd_losses.nan_at_calls +loss.rank=1"
)
# The same texts in one call of their tower, all as long as the context: DDP is told so, or is not.
ALIKE, NOT_KNOWN = "model.text.length_multiple=null", "model.text.length_multiple=16"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders on two ranks, of which one has a loss that is not finite in the third step."""
    folder = tmp_path_factory.mktemp("runs")
    half, end = (f"{folder}/static/checkpoints/samples_{steps * BATCH:014d}.ckpt" for steps in (HALF, STEPS))
    blocks = f"model.grad_checkpointing=blocks finetune=lit init_from={end}"
    said = {
        "static": ALIKE,
        "dynamic": NOT_KNOWN,
        "static_blocks": f"{ALIKE} {blocks}",
        "dynamic_blocks": f"{NOT_KNOWN} {blocks}",
        "small_buckets": f"{NOT_KNOWN} trainer.ddp.bucket_cap_mb=0.1",
        "resumed": f"{ALIKE} resume={half}",
    }
    # Calls of the loss are counted over all runs; it is the third of each, and the first of the one that is resumed.
    calls = (number * STEPS + HALF + 1 - HALF * (name == "resumed") for number, name in enumerate(said))
    runs = [f"{name} {RUN} {what} +loss.calls=[{call}]" for (name, what), call in zip(said.items(), calls)]
    train_on(2, folder, *runs)
    return folder


def told(run: Path) -> list[bool]:
    return json.loads((run / "static_graph.json").read_text())


def tensors(run: Path) -> dict[str, Any]:
    """Size and hash of weights and optimizer state at the end."""
    files = verify(list_checkpoints(run / "checkpoints")[-1]).files
    return {name: record for name, record in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("kind", ["", "_blocks"])
def test_a_static_graph_changes_no_bit(runs, kind):
    static, dynamic = runs / f"static{kind}", runs / f"dynamic{kind}"
    assert told(static) == [True] * STEPS and told(dynamic) == [False] * STEPS
    assert len(metric(static, "train/loss")) == STEPS
    assert metric(static, "train/loss") == metric(dynamic, "train/loss")
    norms = [[str(norm) for norm in metric(run, "train/grad_norm")] for run in (static, dynamic)]
    assert norms[0] == norms[1] and [norm == "nan" for norm in norms[0]] == [False, False, True, False]
    assert len(tensors(static)) == 2 and tensors(static) == tensors(dynamic)


def test_resumed_in_a_static_graph_it_ends_with_the_same_bytes(runs):
    assert told(runs / "resumed") == [True] * (STEPS - HALF)
    assert tensors(runs / "resumed") == tensors(runs / "static")


def test_smaller_buckets_are_more_exchanges_of_the_same_numbers(runs):
    few, many = (json.loads((runs / run / "exchanges.json").read_text()) for run in ("dynamic", "small_buckets"))
    assert all(one < other for one, other in zip(few[1:], many[1:], strict=True))  # the first step is in other buckets
    assert tensors(runs / "small_buckets") == tensors(runs / "dynamic")


CAPTIONER = {"embed_dim": 64, "decoder": {"layers": 1, "heads": 2, "attn_pooler_queries": 4, "attn_pooler_heads": 2}}


@pytest.mark.parametrize(
    ("change", "micro_batch_size", "static"),
    [
        ({"text": {**TINY["text"], "length_multiple": 8}}, None, False),
        ({"text": {**TINY["text"], "length_multiple": None}}, None, True),
        ({"text": {**TINY["text"], "length_multiple": None}}, 8, True),
        ({"text": {**TINY["text"], "length_multiple": None}}, 7, False),
        ({"text": {**TINY["text"], "length_multiple": None}}, "auto", False),
        ({"text": {**TINY["text"], "name": "siglip", "proj": "none"}}, None, True),
        (CAPTIONER, None, True),
    ],
)
def test_where_the_graph_is_static(change, micro_batch_size, static):
    with torch.device("meta"):
        model = create_dual_encoder(**{**TINY, **change})
    assert graph_is_static(model, micro_batch_size, local_batch=8) == static
