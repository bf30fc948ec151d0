import logging

import pytest

from clip_train.training.loggers.patient_writer import PatientWriter, append_whole
from tests.training.full_disk import room_for


def test_what_does_not_fit_leaves_no_half(tmp_path):
    path = tmp_path / "file"
    append_whole(path, b"whole\n")
    with room_for(10), pytest.raises(OSError, match="too large"):
        append_whole(path, b"half of this fits\n")
    assert path.read_bytes() == b"whole\n"


def test_waits_for_room_and_says_so_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "file"
    writer: PatientWriter[bytes] = PatientWriter(path, lambda lines: append_whole(path, b"".join(lines)))
    writer.add([b"one\n"])
    with room_for(6):
        for line in (b"two\n", b"three\n", b"four\n"):
            writer.add([line])
        assert path.read_bytes() == b"one\n"
        writer.close()
    writer.add([b"five\n"])
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "CANNOT WRITE" in said[0] and "3 entries" in said[1] and "4 entries caught up" in said[2]


def test_a_folder_that_is_gone_for_a_while(tmp_path):
    (tmp_path / "folder").write_text("in the way")
    path = tmp_path / "folder" / "file"
    writer: PatientWriter[bytes] = PatientWriter(path, lambda lines: append_whole(path, b"".join(lines)))
    writer.add([b"one\n"])
    (tmp_path / "folder").unlink()
    writer.add([])
    assert path.read_bytes() == b"one\n"
