from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from clip_train.checkpoints.retention import Retention
from clip_train.training.durations import passes


@given(
    saved=st.dictionaries(
        st.integers(1, 60).map(lambda step: 32 * step),
        st.dictionaries(st.just("recall"), st.floats(0, 1), max_size=1),
        max_size=30,
    ),
    newest=st.integers(1, 4),
    best=st.integers(1, 3),
    mode=st.sampled_from(["max", "min"]),
)
def test_the_newest_milestones_and_the_best_stay(saved, newest, best, mode):
    is_milestone = partial(passes, batch_size=32, every_samples=500)
    kept = Retention(newest, is_milestone, best, "recall", mode).kept(saved)
    assert set(sorted(saved)[-newest:]) <= kept
    assert {seen for seen in saved if seen % 500 < 32} <= kept
    judged = {seen: metrics["recall"] for seen, metrics in saved.items() if metrics}
    ranked = sorted(judged.values(), reverse=mode == "max")[:best]
    assert all(
        judged[seen] in ranked
        for seen in kept & judged.keys()
        if seen not in sorted(saved)[-newest:] and seen % 500 >= 32
    )
    assert sum(judged[seen] in ranked for seen in kept & judged.keys()) >= len(ranked)


def test_without_a_metric_none_is_best():
    metrics = {32: {"recall": 0.9}, 64: {"recall": 0.1}}
    assert Retention(1).kept(metrics) == {64}
    assert not Retention(1).is_best({"recall": 1.0}, metrics)


def test_what_would_be_best():
    retention = Retention(1, best=1, metric="loss", mode="min")
    saved = {32: {"loss": 2.0}, 64: {}}
    assert retention.is_best({"loss": 1.5}, saved)
    assert not retention.is_best({"loss": 2.5}, saved)
    assert not retention.is_best({}, saved)
    assert not retention.is_best({"loss": 2.0}, saved)  # the older of equals stays
