from clip_train.training.loggers.csv_logger import CsvLogger, read_metrics
from tests.training.full_disk import room_for


def test_rows_survive_new_columns_and_a_second_logger(tmp_path):
    logger = CsvLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 0.1 + 0.2, "samples_seen": 32}, step=1)
    logger.log_metrics({"val/set/loss": 2.0, "samples_seen": 32}, step=1)
    CsvLogger(str(tmp_path)).log_metrics({"train/loss": 0.5, "samples_seen": 64}, step=2)
    columns, rows = read_metrics(tmp_path / "metrics.csv")
    assert columns == ["step", "samples_seen", "train/loss", "val/set/loss"]
    assert [tuple(row.values()) for row in rows] == [
        ("1", "32", "0.30000000000000004", ""),
        ("1", "32", "", "2.0"),
        ("2", "64", "0.5", ""),
    ]


def test_steps_to_be_taken_again_are_forgotten(tmp_path):
    logger = CsvLogger(str(tmp_path))
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 1.0, "samples_seen": 32 * step}, step=step)
    with open(logger.path, "a") as file:
        file.write("4,")  # a kill in the middle of a row
    CsvLogger(str(tmp_path)).resume_after(2, 64)
    assert [row["step"] for row in read_metrics(logger.path)[1]] == ["1", "2"]


def test_a_full_disk_delays_rows_and_new_columns(tmp_path):
    logger = CsvLogger(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0, "samples_seen": 32}, step=1)
    before = logger.path.read_bytes()
    with room_for(len(before) + 3):
        logger.log_metrics({"train/loss": 0.5, "samples_seen": 64}, step=2)
        logger.log_metrics({"val/loss": 2.0, "samples_seen": 64}, step=2)
        assert logger.path.read_bytes() == before
    logger.finalize("success")
    columns, rows = read_metrics(logger.path)
    assert columns == ["step", "samples_seen", "train/loss", "val/loss"]
    assert [tuple(row.values()) for row in rows] == [
        ("1", "32", "1.0", ""),
        ("2", "64", "0.5", ""),
        ("2", "64", "", "2.0"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
