import logging
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clip_train.training.loggers.tensorboard_logger import TensorboardLogger
from tests.training.full_disk import room_for


def losses(folder) -> dict[int, float]:
    """What TensorBoard shows: loss by step; a step that is there twice fails the test."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_a_resumed_run_goes_on_in_place_without_steps_twice(tmp_path):
    first = TensorboardLogger(str(tmp_path))
    first.log_hyperparams({"optim": {"lr": 1}})
    first.resume_after(0, 0)
    for step in range(1, 8):
        first.log_metrics({"train/loss": 1.0, "samples_seen": 32 * step}, step=step)
    time.sleep(0.01)  # files have the time in their names
    second = TensorboardLogger(str(tmp_path))
    second.resume_after(4, 128)
    for step in (5, 6):
        second.log_metrics({"train/loss": 2.0, "samples_seen": 32 * step}, step=step)
    assert losses(tmp_path) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}


def test_a_full_disk_delays_events(tmp_path, caplog):
    logger = TensorboardLogger(str(tmp_path))
    logger.resume_after(0, 0)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    (path,) = (tmp_path / "tensorboard").iterdir()
    caplog.set_level(logging.ERROR)
    with room_for(path.stat().st_size + 5):
        logger.log_metrics({"train/loss": 2.0}, step=2)
        assert losses(tmp_path) == {1: 1}
    assert "CANNOT WRITE" in caplog.text
    logger.finalize("success")
    assert losses(tmp_path) == {1: 1, 2: 2}
