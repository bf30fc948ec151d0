from clip_train.training.rows import append_rows, drop_rows_after, read_rows


def test_rows_of_steps_to_be_taken_again_are_dropped(tmp_path):
    path = tmp_path / "samples" / "rank.csv"
    drop_rows_after(path, 5)  # nothing there yet
    for samples_seen in (8, 16, 24):
        append_rows(path, ["samples_seen", "name"], [(samples_seen, f"{samples_seen}, {i}") for i in range(2)])
    with open(path, "a") as file:
        file.write("32")  # a kill in the middle of a row
    assert len(read_rows(path)) == 6
    drop_rows_after(path, 16)
    assert read_rows(path) == [["8", "8, 0"], ["8", "8, 1"], ["16", "16, 0"], ["16", "16, 1"]]
    append_rows(path, ["samples_seen", "name"], [(24, "again")])
    assert read_rows(path)[-1] == ["24", "again"]
