"""trainer.profile: what is written, and of which steps."""

import gzip
import json
from contextlib import contextmanager

from clip_train.training.instruments.profiling import StepProfile
from tests.training.test_module import train


def test_a_trace_and_a_table_of_some_steps(tmp_path):
    written_at = []

    @contextmanager
    def paused(_):
        yield
        written_at.append((tmp_path / "profile" / "table.txt").exists())

    train("32", 6, tmp_path, callbacks=[StepProfile(2, tmp_path / "profile", paused)])
    assert written_at == [True]
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert "aten::addmm" in names
    assert "aten::addmm" in (tmp_path / "profile" / "table.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["table.txt", "trace.json.gz"]


def test_a_run_that_ends_before_is_profiled_so_far(tmp_path):
    train("32", 3, tmp_path, callbacks=[StepProfile(100, tmp_path / "profile")])
    assert (tmp_path / "profile" / "trace.json.gz").exists()
