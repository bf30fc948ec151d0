from hypothesis import given
from hypothesis import strategies as st

from clip_train.checkpoints.retention import Retention, Saved


@given(
    saved=st.dictionaries(
        st.integers(1, 60).map(lambda step: 32 * step),
        st.builds(
            Saved, metrics=st.dictionaries(st.just("recall"), st.floats(0, 1), max_size=1), milestone=st.booleans()
        ),
        max_size=30,
    ),
    newest=st.integers(1, 4),
    best=st.integers(1, 3),
    mode=st.sampled_from(["max", "min"]),
)
def test_the_newest_milestones_and_the_best_stay(saved, newest, best, mode):
    kept = Retention(newest, best, "recall", mode).kept(saved)
    for_other_reasons = {*sorted(saved)[-newest:], *(seen for seen in saved if saved[seen].milestone)}
    assert for_other_reasons <= kept
    judged = {seen: entry.metrics["recall"] for seen, entry in saved.items() if entry.metrics}
    ranked = sorted(judged.values(), reverse=mode == "max")[:best]
    assert all(seen in judged and judged[seen] in ranked for seen in kept - for_other_reasons)
    assert sum(judged[seen] in ranked for seen in kept & judged.keys()) >= len(ranked)


def test_without_a_metric_none_is_best():
    saved = {32: Saved({"recall": 0.9}), 64: Saved({"recall": 0.1})}
    assert Retention(1).kept(saved) == {64}
    assert not Retention(1).is_best({"recall": 1.0}, saved)


def test_what_would_be_best():
    retention = Retention(1, best=1, metric="loss", mode="min")
    saved = {32: Saved({"loss": 2.0}), 64: Saved()}
    assert retention.is_best({"loss": 1.5}, saved)
    assert not retention.is_best({"loss": 2.5}, saved)
    assert not retention.is_best({}, saved)
    assert not retention.is_best({"loss": 2.0}, saved)  # the older of equals stays
    assert retention.is_top(32, saved) and not retention.is_top(64, saved)
