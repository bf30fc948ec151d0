import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_train.errors import DivergedError
from clip_train.training.callbacks.guard import Guard, StepRecord
from clip_train.training.callbacks.guard_report import write_report
from clip_train.training.callbacks.health import Health
from clip_train.training.optim import bad_step
from clip_train.training.optim.bad_step import clip_or_skip, restore_unless, running_statistics, telling_seed
from clip_train.training.rollback import RollBack, note_rollback, noted_rollback
from tests.data.test_batches import train_batches

NAN = float("nan")
B = 10


def healthy() -> Health:
    return Health(spike_window=20, spike_deviations=10, scale_steps=5, least_scale=2)


def make_guard(**changes) -> Guard:
    settings = {
        "max_bad_steps": 3,
        "max_rollbacks": 1,
        "health": healthy(),
        "last_checkpoint": lambda: (Path("samples_00000000000020.ckpt"), 20),
        "report": lambda steps, skipped: Path("guard_report.json"),
    }
    return Guard(**{**settings, **changes})


def run(guard: Guard, losses: list[float], read_every: int = 1, skipped_samples: int = 0) -> None:
    """Steps with these losses, acted upon every few steps."""
    trainer = SimpleNamespace(is_global_zero=True)
    module = SimpleNamespace(skipped_samples=skipped_samples, clock=SimpleNamespace(batch_size=B))
    for step, loss in enumerate(losses, start=1):
        metrics = {"train/loss": loss, "train/grad_norm": 1.0, "train/logit_scale": 14.0}
        guard.note(step, step * B, metrics)
        if step % read_every == 0:
            guard.act(trainer, module)  # pyright: ignore[reportArgumentType]


def test_bad_steps_that_are_not_in_a_row_are_only_counted():
    guard = make_guard()
    run(guard, [1.0, NAN, NAN, 1.0, float("inf"), NAN])
    assert guard.skipped_steps == 4
    assert guard.in_bad_row


@pytest.mark.parametrize("read_every", [1, 4, 9])
def test_how_often_the_metrics_are_read_does_not_matter(read_every):
    with pytest.raises(RollBack) as caught:
        run(make_guard(), [1.0, 1.0, 1.0, NAN, NAN, NAN, NAN, NAN, 1.0], read_every, skipped_samples=5)
    # The third bad step ends at position 65; the checkpoint has seen 20 samples.
    assert (caught.value.skipped_samples, caught.value.count) == (45, 1)


def test_without_a_checkpoint_back_to_the_start():
    with pytest.raises(RollBack) as caught:
        run(make_guard(last_checkpoint=lambda: None), [NAN] * 3)
    assert (caught.value.checkpoint, caught.value.skipped_samples) == (None, 30)


def test_the_second_time_it_ends_whether_or_not_it_was_resumed_meanwhile():
    undone = RollBack(Path("samples_00000000000020.ckpt"), 40, 1)
    with pytest.raises(DivergedError, match=r"after 10 samples: 3 steps in a row, up to step 4, .* after going back 1"):
        run(make_guard(undone=undone), [1.0, NAN, NAN, NAN])
    resumed = make_guard()
    resumed.load_state_dict({"skipped_steps": 7, "rollbacks": 1})
    with pytest.raises(DivergedError):
        run(resumed, [NAN] * 3)
    assert resumed.skipped_steps == 10


def test_what_cannot_be_asked_does_not_keep_the_others_waiting():
    def full_disk(steps, skipped):
        raise OSError("No space left on device")

    with pytest.raises(DivergedError, match="the log names the samples"):
        run(make_guard(max_rollbacks=0, report=full_disk), [NAN] * 3)


def test_a_rolled_back_module_leaves_the_samples_out_whatever_the_checkpoint_says():
    guard = make_guard(undone=RollBack(None, 40, 1))
    module = SimpleNamespace(skipped_samples=0)
    guard.on_load_checkpoint(None, module, {})  # pyright: ignore[reportArgumentType]
    assert module.skipped_samples == 40


def test_a_roll_back_is_known_until_the_run_has_come_further(tmp_path):
    file, checkpoint = tmp_path / "rollback.json", tmp_path / "samples_00000000000020.ckpt"
    assert noted_rollback(file, checkpoint) is None
    for source in (checkpoint, None):
        note_rollback(file, RollBack(source, 40, 2))
        found = noted_rollback(file, source)
        assert found and (found.checkpoint, found.skipped_samples, found.count) == (source, 40, 2)
        assert noted_rollback(file, tmp_path / "samples_00000000000030.ckpt") is None


def test_a_spike_is_said_once_and_again_when_it_was_over():
    health = healthy()
    losses = [5 - 0.01 * step for step in range(30)]
    assert [health.spike(loss) for loss in losses] == [None] * 30
    spike = [health.spike(loss) for loss in (9.0, 9.5, 9.0)]
    assert "the loss jumps to 9," in (spike[0] or "")
    assert spike[1:] == [None, None]
    assert health.spike(4.7) is None
    assert health.spike(9.0)
    assert Health(spike_window=20, spike_deviations=None, scale_steps=None, least_scale=None).spike(1e9) is None


def test_a_loss_that_hardly_moves_spikes_when_it_jumps_and_not_when_it_trembles():
    health = healthy()
    assert not any(health.spike(3.0 + 1e-6 * (step % 2)) for step in range(40))
    assert health.spike(3.1) is None
    assert health.spike(4.0)


def test_a_temperature_that_stays_at_its_limit_or_falls_is_said_once():
    health = healthy()
    assert [bool(health.odd_scale(100.0)) for _ in range(12)] == [False] * 4 + [True] + [False] * 7
    assert health.odd_scale(50.0) is None
    assert [bool(health.odd_scale(scale)) for scale in (3.0, 1.9, 1.5, 2.5, 1.9)] == [False, True, False, False, True]
    began_low = healthy()
    assert began_low.odd_scale(1.0) is None


def test_the_report_names_the_samples_of_the_bad_steps(make_shards, tmp_path):
    batches = replace(train_batches(make_shards([7, 9])), batch_size=4)
    metrics = {"train/loss": 3.0, "train/grad_norm": 1.0}
    steps = [StepRecord(1, 4, metrics), StepRecord(2, 8, {**metrics, "train/grad_norm": float("inf")})]
    report = json.loads(write_report(tmp_path / "r.json", steps, 12, batches, {"seed": 0}).read_text())
    shards, samples = batches.order.locate(torch.arange(16, 20).numpy())
    expected: dict[str, list[str]] = {}
    for shard, sample in zip(shards.tolist(), samples.tolist()):
        expected.setdefault(batches.reader.shard_names[shard], []).append(f"{sample + 7 * shard:06d}")
    (bad,) = report["bad_steps"]
    assert (bad["step"], bad["position"], bad["samples"]) == (2, 16, expected)
    assert [step["train/grad_norm"] for step in report["last_steps"]] == [1.0, "inf"]
    assert report["config"] == {"seed": 0}


def test_the_statistics_of_a_batch_norm_survive_a_bad_step():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for bad in (False, True):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        statistics = running_statistics(model)
        loss = model(torch.full((2, 3), NAN) if bad else torch.randn(2, 3)).square().mean()
        loss.backward(gradient=telling_seed(loss))
        norm = clip_or_skip(optimizer, model.parameters(), None)
        optimizer.step()
        optimizer.zero_grad()
        restore_unless(norm.isfinite(), statistics)
        same = [torch.equal(value, before[name]) for name, value in model.state_dict().items()]
        assert all(same) if bad else not all(same[2:])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_fused_optimizer_is_told_where_the_gradients_are(monkeypatch, device):
    """Offloaded gradients lie in host memory, their norm on the GPU; tensors are fake, as there need be no GPU."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.ones(3, device=device))
        parameter.grad = torch.ones(3, device=device)
        optimizer = torch.optim.AdamW([parameter], fused=False)
        optimizer.defaults["fused"] = True
        monkeypatch.setattr(bad_step, "_norm", lambda grads: torch.ones((), device="cuda"))
        clip_or_skip(optimizer, [parameter], None)
        assert optimizer.found_inf.device.type == device  # pyright: ignore[reportAttributeAccessIssue]
