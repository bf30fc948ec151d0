"""Errors that are the user's to mend. `commands/` prints each as one line and exits with 2."""


class ClipTrainError(Exception):
    """The input is wrong; the message names the thing and the remedy, in one line."""


class ConfigError(ClipTrainError):
    """A config key or value that cannot be used."""


class DataError(ClipTrainError):
    """Shards or samples that cannot be used."""


class UnreachableError(DataError):
    """Data that could not be read for some time, though it may be there: to try again later may help."""


class OutOfMemoryError(ClipTrainError):
    """A step does not fit into the memory of a device."""


class DivergedError(ClipTrainError):
    """Training has diverged, and going back did not help. Exit code 70 instead of 2."""


class RunExistsError(ClipTrainError):
    """The run folder already holds a run and resuming was not asked for."""


class SaveError(ClipTrainError):
    """The last checkpoint of a run could not be written."""


class FaultError(ClipTrainError):
    """A fault on one rank, which all ranks end for. Exit code 1 instead of 2."""


def first_line(error: BaseException) -> str:
    """Of another library's message, for a message of one line."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line.rstrip(".")[:200]
