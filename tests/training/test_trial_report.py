from types import SimpleNamespace
from typing import Any

import pytest

from clip_train.errors import RunExistsError
from clip_train.sweeps.trial import Trial, TrialFile
from clip_train.training.callbacks.trial_report import TrialReport
from clip_train.training.rollback import RollBack

NOTHING: Any = SimpleNamespace()


def test_a_run_keeps_others_out_until_it_goes_back_and_is_taken_up_again(tmp_path):
    TrialFile(tmp_path).write(Trial(0, (), tmp_path), None)
    first = TrialReport(tmp_path, 0, None, NOTHING)
    with pytest.raises(RunExistsError):
        TrialReport(tmp_path, 0, None, NOTHING)
    first.on_exception(NOTHING, NOTHING, RollBack(None, 0, 1))
    again = TrialReport(tmp_path, 0, None, NOTHING)
    with pytest.raises(RunExistsError):
        TrialReport(tmp_path, 0, None, NOTHING)
    again.on_exception(NOTHING, NOTHING, RollBack(None, 0, 2))
