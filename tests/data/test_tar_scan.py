import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_train.data.tar_scan import Member, scan_tar
from clip_train.errors import DataError

LONG = "folder/" * 30 + "a-name-longer-than-a-header-holds.jpg"


def write_tar(path, names: list[str], format: int) -> bytes:
    with tarfile.open(path, "w", format=format) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return path.read_bytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_equals_the_standard_library(tmp_path, format):
    names = ["a.jpg", "b/c.txt", "ünïcode.json", "x" * 90 + "/" + "y" * 90 + ".txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append(LONG)
    write_tar(tmp_path / "t.tar", names, format)
    with tarfile.open(tmp_path / "t.tar") as archive:
        expected = [Member(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert list(scan_tar(str(tmp_path / "t.tar"))) == expected
    assert [member.name for member in expected] == names


@given(cut=st.integers(0, 10_000))
def test_a_cut_tar_is_never_taken_for_whole(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "t.tar"
    content = write_tar(path, ["a.jpg", "b.jpg", "c.jpg"], tarfile.PAX_FORMAT)
    end = content.rstrip(b"\0").__len__() // 512 * 512 + 512  # where the archive's end is marked
    path.write_bytes(content[: min(cut, end)])
    with pytest.raises(DataError):
        list(scan_tar(str(path)))


def test_damage_in_the_middle_is_found(tmp_path):
    path = tmp_path / "t.tar"
    content = bytearray(write_tar(path, ["a.jpg", "b.jpg"], tarfile.PAX_FORMAT))
    second = next(scan for scan in list(scan_tar(str(path))) if scan.name == "b.jpg")
    content[second.offset - 500] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged at byte {second.offset - 512}"):
        list(scan_tar(str(path)))


def test_two_tars_in_one_and_zeros_in_place_of_data(tmp_path):
    path = tmp_path / "t.tar"
    content = write_tar(path, ["a.jpg", "b.jpg"], tarfile.PAX_FORMAT)
    path.write_bytes(content + content)
    with pytest.raises(DataError, match="two tars in one"):
        list(scan_tar(str(path)))
    path.write_bytes(content + bytes(2 << 20))
    with pytest.raises(DataError, match="nothing but zeros"):
        list(scan_tar(str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"hello" * 200, "not a tar"), (b"\x1f\x8b" + b"x" * 600, "compressed"), (b"", "not a tar")],
)
def test_not_a_tar(tmp_path, content, message):
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(scan_tar(str(tmp_path / "t.tar")))


def test_missing(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        list(scan_tar(str(tmp_path / "none.tar")))
