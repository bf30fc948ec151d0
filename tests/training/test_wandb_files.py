import pytest

from clip_train.training.loggers.wandb_files import last_step, read_records


@pytest.mark.parametrize("content", [b"", b":W&"])
def test_a_file_cut_in_its_header_has_no_records(tmp_path, content):
    path = tmp_path / "run-x.wandb"
    path.write_bytes(content)
    assert list(read_records(path)) == []
    assert last_step([path]) == -1
