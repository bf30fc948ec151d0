import json
from dataclasses import asdict

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from clip_train.errors import ConfigError
from clip_train.sweeps.objective import Objective
from clip_train.sweeps.plots import draw_study
from clip_train.sweeps.study import StudySettings, StudyTrials
from clip_train.sweeps.trial import COMPLETE, DIVERGED, FAILED, PRUNED, RUNNING, Trial

RANDOM = {"_target_": "optuna.samplers.RandomSampler", "seed": 0}
SPACE = {"lr": FloatDistribution(1e-5, 1e-1, log=True), "model": CategoricalDistribution(["a", "b"])}


def settings(folder, storage="study.journal"):
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "lower": 0.1}
    return StudySettings(storage.format(folder=folder), "lr", Objective(None, "maximize"), pruner)


def open_trials(folder, n_trials, space=SPACE, storage="{folder}/study.journal"):
    return StudyTrials(settings(folder, storage), RANDOM, space, n_trials, lambda number: folder / str(number))


def draw(trials: StudyTrials) -> Trial:
    trial = trials.next()
    assert trial
    return trial


@pytest.mark.parametrize(
    ("storage", "end"), [("{folder}/study.journal", FAILED), ("sqlite:///{folder}/study.db", DIVERGED)]
)
def test_goes_on_with_what_was_left_and_counts_what_is_done(tmp_path, storage, end):
    trials = open_trials(tmp_path, 4, storage=storage)
    done, bad, left = (draw(trials) for _ in range(3))
    done.state, done.value, bad.state = COMPLETE, 0.5, end
    trials.finish(done)
    trials.finish(bad)

    again = open_trials(tmp_path, 4, storage=storage)
    assert [trial.state for trial in again.all()] == [COMPLETE, end, RUNNING]
    resumed, new = draw(again), draw(again)
    assert (resumed.number, resumed.overrides) == (2, left.overrides)
    assert new.number == 3
    assert again.next() is None
    drawn = [trial.overrides for trial in again.all()]
    assert len(set(drawn)) == 4  # the seed is the same, the draws are not


def test_a_run_reports_and_learns_that_it_is_pruned(tmp_path):
    trials = open_trials(tmp_path, 2)
    trial = draw(trials)
    plain = json.loads(json.dumps(asdict(settings(tmp_path, "{folder}/study.journal"))))
    inside = StudySettings.of(plain)
    assert not inside.report(trial.number, 1, 0.5)
    assert inside.report(trial.number, 2, 0.05)
    assert inside.report(trial.number, 2, 0.7)  # a resumed run reports again; the first value stays
    trial.state = PRUNED
    trials.finish(trial)
    (known,) = trials.study.trials
    assert known.intermediate_values == {1: 0.5, 2: 0.05}
    assert [trial.state for trial in trials.all()] == [PRUNED]


def test_another_search_or_direction_is_refused(tmp_path):
    trials = open_trials(tmp_path, 9)
    first = draw(trials)
    first.state = FAILED
    trials.finish(first)
    with pytest.raises(ConfigError, match="is of another search"):
        open_trials(tmp_path, 9, {**SPACE, "model": CategoricalDistribution(["a", "c"])}).next()
    with pytest.raises(ConfigError, match="direction=maximize"):
        StudySettings(str(tmp_path / "study.journal"), "lr", Objective(None, "minimize"), RANDOM).open()


def test_pictures_need_something_to_compare_and_a_place(tmp_path, caplog):
    trials = open_trials(tmp_path, 9)
    for value in (0.5, 0.6, 0.7):
        trial = draw(trials)
        assert draw_study(trials.study, tmp_path, "recall") == [] or value == 0.7
        trial.state, trial.value = COMPLETE, value
        trials.finish(trial)
    paths = draw_study(trials.study, tmp_path, "recall")
    assert [path.name for path in paths] == ["importance.png", "parallel_coordinate.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert draw_study(trials.study, tmp_path / "gone", "recall") == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
