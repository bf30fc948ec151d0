import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from clip_train.checkpoints.tensor_files import Piece, file_record, read_shapes, read_tensors, write_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=0, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_the_format_s_own_library_reads_what_was_written(tmp_path_factory, shapes, dtype):
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {f"weight.{i}": torch.randint(0, 2, shape).to(dtype) for i, shape in enumerate(shapes)}
    record = write_tensors(path, {name: Piece.whole(tensor) for name, tensor in tensors.items()})
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record == file_record(path)
    for found in (load_file(path), read_tensors([path])):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors)
    assert read_shapes([path]) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_what_is_not_contiguous_is_written_in_order(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "a.safetensors", {"a": Piece.whole(tensor)})
    assert torch.equal(read_tensors([tmp_path / "a.safetensors"])["a"], tensor)


@given(cut=st.integers(1, 4), down=st.integers(1, 2))
def test_pieces_of_several_files_are_put_together(tmp_path_factory, cut, down):
    folder = tmp_path_factory.mktemp("pieces")
    whole, other = torch.randn(3, 5), torch.randn(2)
    corners = [(slice(0, down), slice(0, cut)), (slice(0, down), slice(cut, 5)), (slice(down, 3), slice(0, 5))]
    paths = []
    for number, (rows, columns) in enumerate(corners):
        pieces = {"whole": Piece(whole[rows, columns], (3, 5), (rows.start, columns.start))}
        if number == 0:
            pieces["other"] = Piece.whole(other)
        paths.append(folder / f"{number}.safetensors")
        write_tensors(paths[-1], pieces)
    found = read_tensors(paths)
    assert torch.equal(found["whole"], whole)
    assert torch.equal(found["other"], other)
    assert read_shapes(paths) == {"whole": (3, 5), "other": (2,)}
    with pytest.raises(ValueError, match="1 tensors are missing, first whole"):
        read_tensors(paths[:2])
