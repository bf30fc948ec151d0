"""What limits a run, by its figures, and what the line says to try."""

import pytest

from clip_train.training.instruments.limits import LimitLine, Settings, limit_of, remedy
from clip_train.training.instruments.step_times import BACKWARD, COMMUNICATION, DATA, FORWARD, PARTS

PLAIN = Settings("bf16-mixed", True, False, False, False, "ddp", "gather")


def parts(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(PARTS, 0.0), **seconds}


# Seconds of parts in a step of one second, the device's lag behind the host, and what limits it.
CASES = [
    (parts(data=0.02, forward=0.3, backward=0.6), None, "compute"),
    (parts(data=0.3, forward=0.3, backward=0.3), None, "data"),
    (parts(data=0.09, communication=0.09, forward=0.4, backward=0.4), None, "compute"),
    (parts(data=0.12, communication=0.2, forward=0.3, backward=0.3), None, "communication"),
    (parts(data=0.2, communication=0.12, forward=0.3, backward=0.3), None, "data"),
    (parts(forward=0.3, backward=0.3, optimizer=0.1), None, "launch"),  # nearly a third in no part
    (parts(forward=0.3, backward=0.6), 0.5, "compute"),  # a device half a step behind its host
    (parts(forward=0.3, backward=0.6), 0.01, "launch"),  # one that has nothing to do until it is told
    (parts(data=0.4, forward=0.2, backward=0.3), 0.01, "data"),
]


@pytest.mark.parametrize(("seconds", "lag", "limit"), CASES)
def test_what_limits_a_step(seconds, lag, limit):
    assert limit_of(seconds, 1.0, lag) == limit
    longer = {part: 7 * value for part, value in seconds.items()}
    assert limit_of(longer, 7.0, None if lag is None else 7 * lag) == limit


REMEDIES = [
    ("data", {}, "set data.decode=fast"),
    ("launch", {}, "trainer.compile=true"),
    ("launch", {"compiled": True}, "a larger batch_size"),
    ("launch", {"encodes_twice": True}, "a larger micro_batch_size"),
    ("communication", {}, "a larger batch_size"),
    ("communication", {"strategy": "fsdp"}, "trainer.strategy=ddp"),
    ("communication", {"exchange": "ring", "strategy": "fsdp"}, "loss.exchange=gather"),
    ("compute", {"precision": "32"}, "trainer.precision=bf16-mixed"),
    ("compute", {"precision": "32", "bf16": False}, "trainer.compile=true"),
    ("compute", {"recomputes": True}, "model.grad_checkpointing=none"),
    ("compute", {"compiled": True, "encodes_twice": True}, "a larger micro_batch_size"),
    ("compute", {"compiled": True}, "nothing but more devices"),
    ("compute", {"compiled": True, "strategy": "fsdp"}, "trainer.strategy=ddp"),
    ("compute", {"compiled": None}, "nothing but more devices"),
]


@pytest.mark.parametrize(("limit", "changed", "said"), REMEDIES)
def test_a_setting_to_try_that_is_not_set_already(limit, changed, said):
    settings = Settings(**{**PLAIN.__dict__, **changed})
    assert remedy(limit, settings, "set data.decode=fast").startswith(said)


def test_the_line_comes_after_the_first_steps_and_then_rarely():
    now = [0.0]
    line = LimitLine(PLAIN, now=lambda: now[0])
    computing, loading = parts(forward=0.5, backward=0.5), parts(data=0.5, forward=0.5)
    waiting = parts(communication=0.5, backward=0.5)
    assert line.line(11, computing, 1.0, None, None) is None
    assert line.line(21, computing, 1.0, None, None) == (
        "limited by compute; to try: trainer.compile=true (a step of 1,000 ms: 0% data, 50% forward, 0% loss,"
        " 50% backward, 0% optimizer, 0% communication, 0% beside)"
    )
    assert line.line(31, waiting, 1.0, None, None) is None  # not again so soon
    now[0] = 601
    assert line.line(41, computing, 1.0, None, None) is None  # nothing new
    assert "limited by data; to try: faster disks (" in (line.line(51, loading, 1.0, None, "faster disks") or "")
    now[0] = 1202
    assert "limited by data" in (line.line(61, loading, 1.0, None, None) or "")
    assert line.line(62, computing, 1.0, None, None, last=True) is None


def test_a_short_run_has_its_line_at_the_end():
    line = LimitLine(PLAIN)
    assert line.line(4, parts(**{FORWARD: 0.4, BACKWARD: 0.5}), 1.0, None, None) is None
    assert "communication" in (line.line(5, parts(**{COMMUNICATION: 0.4, DATA: 0.1}), 1.0, None, None, last=True) or "")
