import logging
import sys
import threading
import warnings

import pytest

from clip_train.errors import DataError
from clip_train.training.rank_log import start_rank_log


@pytest.fixture(autouse=True)
def loggers_as_before():
    names = ("", "clip_train", "lightning", "lightning.pytorch", "lightning.fabric", "torch", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    logging.captureWarnings(False)
    before, hook = [list(logger.handlers) for logger in loggers], threading.excepthook
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers = handlers
    logging.captureWarnings(False)
    threading.excepthook = hook


def test_early_records_libraries_warnings_and_the_rank(tmp_path, capsys):
    log = start_rank_log(3)
    logging.getLogger("clip_train.part").warning("said before the folder was there")
    log.open(tmp_path / "logs" / "rank_00003.log")
    logging.getLogger("lightning.pytorch").warning("of lightning")
    logging.getLogger("some.library").warning("of a library")
    chatty = logging.getLogger("chatty")
    chatty.setLevel(logging.DEBUG)
    chatty.info("all it does")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("of Python", stacklevel=1)
    lines = (tmp_path / "logs" / "rank_00003.log").read_text().splitlines()
    for text in ("said before the folder was there", "of lightning", "of a library", "of Python"):
        assert sum(text in line and "[rank 3] WARNING" in line for line in lines) == 1, text
    assert not any("all it does" in line for line in lines)
    assert capsys.readouterr() == ("", "")  # the terminal is the first rank's


def test_the_terminal_shows_a_fault_of_any_rank_once(tmp_path, capsys):
    logger = logging.getLogger("clip_train")
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    log = start_rank_log(3)
    log.open(tmp_path / "rank_00003.log")
    part = logging.getLogger("clip_train.part")
    part.error("not to be seen there")
    try:
        print(1 / 0)
    except ZeroDivisionError:
        part.critical("a fault", exc_info=True)
    shown = capsys.readouterr()
    for text in (shown.out + shown.err, (tmp_path / "rank_00003.log").read_text()):
        assert text.count("a fault") == text.count("print(1 / 0)") == 1
    assert "not to be seen there" not in shown.out + shown.err


def test_what_a_process_or_a_thread_dies_of(tmp_path):
    log = start_rank_log(0)
    log.open(tmp_path / "train.log")
    with pytest.raises(ZeroDivisionError), log.noting_errors():
        print(1 / 0)
    with pytest.raises(DataError), log.noting_errors():
        raise DataError("the user's to mend")
    thread = threading.Thread(target=lambda: {}["missing key"], name="reader")
    thread.start()
    thread.join()
    text = (tmp_path / "train.log").read_text()
    assert "print(1 / 0)" in text and "ZeroDivisionError" in text
    assert text.count("the user's to mend") == 1
    assert "thread reader has died" in text and "missing key" in text
