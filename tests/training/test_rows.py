import logging

from clip_train.training.loggers.rows import RowsFile, drop_rows_after, read_rows


def test_rows_of_steps_to_be_taken_again_are_dropped(tmp_path):
    path = tmp_path / "samples" / "rank.csv"
    drop_rows_after(path, 5)  # nothing there yet
    rows = RowsFile(path, ["samples_seen", "name"])
    for samples_seen in (8, 16, 24):
        rows.append((samples_seen, f"{samples_seen},\n{i}") for i in range(2))
    with open(path, "a") as file:
        file.write("32,cut")  # a kill in the middle of a row
    assert len(read_rows(path)) == 6
    drop_rows_after(path, 16)
    assert read_rows(path) == [["8", "8,\n0"], ["8", "8,\n1"], ["16", "16,\n0"], ["16", "16,\n1"]]
    RowsFile(path, ["samples_seen", "name"]).append([(24, "again")])
    assert read_rows(path)[-1] == ["24", "again"]
    assert path.read_text().count("name") == 1


def test_a_header_that_a_kill_has_cut_is_written_again(tmp_path):
    path = tmp_path / "rank.csv"
    path.write_text("samples_se")
    drop_rows_after(path, 0)
    RowsFile(path, ["samples_seen", "name"]).append([(8, "a")])
    assert path.read_bytes() == b"samples_seen,name\r\n8,a\r\n"


def test_a_file_that_cannot_be_changed_does_not_end_the_run(tmp_path, caplog):
    path = tmp_path / "rank.csv"
    path.mkdir()
    with caplog.at_level(logging.ERROR):
        drop_rows_after(path, 0)
    assert "CANNOT CHANGE" in caplog.text
