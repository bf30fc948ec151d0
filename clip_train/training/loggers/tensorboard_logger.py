"""TensorBoard: a run in one folder, however often it is resumed, without the steps that are taken again."""

import io
import json
import os
import socket
import time
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from clip_train.errors import ConfigError
from clip_train.training.loggers.patient_writer import PatientWriter, append_whole
from clip_train.training.loggers.run_logger import RunLogger


class TensorboardLogger(RunLogger):
    """Writes an event file by whole records; torch's own writer ends the run when the disk is full.

    A resumed run begins another file, which tells TensorBoard to forget the steps that come again (its `purge_step`).

    Args:
        save_dir: the run folder; event files go to `tensorboard` in it.

    Raises:
        ConfigError: the extra `tensorboard` is not installed.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "logger=tensorboard needs the extra: pip install '.[tensorboard]' in the checkout"
            ) from error
        # TensorBoard reads them in the order of their names.
        name = f"events.out.tfevents.{time.time():.3f}.{socket.gethostname()}.{os.getpid()}"
        self._writer: PatientWriter[bytes] = PatientWriter(
            self.folder / "tensorboard" / name, lambda records: append_whole(self._writer.path, b"".join(records))
        )
        self._config: dict[str, Any] = {}

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args, **kwargs) -> None:
        self._config = params

    @rank_zero_only
    def resume_after(self, step: int, samples_seen: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.text.summary_v2 import text_pb

        config = "\n".join(f"    {line}" for line in json.dumps(self._config, indent=2).splitlines())
        begin = _record(file_version="brain.Event:2")
        purge = _record(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._writer.add([begin, purge, _record(step=step, summary=text_pb("config", config))])

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add([_record(step=step, summary=Summary(value=values))])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._writer.close()


def _record(**fields: Any) -> bytes:
    """An event as it stands in a file, with its length and checksums."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = io.BytesIO()
    RecordWriter(file).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return file.getvalue()
