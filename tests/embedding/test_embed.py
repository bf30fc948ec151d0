"""clip-embed: the same files whatever happens, however many processes there are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.torch import save_file

from clip_train.commands import embed
from tests.cli.embeddings import call, write_model
from tests.cli.warm_start import WarmProcess, run_module
from tests.conftest import encode_image, make_sample, write_shard
from tests.interop.tiny import CLIP, ours

MODULE = "clip_train.commands.embed"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
BAD_IMAGE, NO_TEXT = 5, 17
SETTINGS = ["dtype=float32", "metadata=[price,tags]", "batch_size=4", "data.num_workers=0", "trainer.accelerator=cpu"]


def change(number: int) -> dict:
    sample = make_sample(number)
    sample["json"] |= {"price": number if number % 2 else number + 0.5, "tags": ["a", number]}
    if number == BAD_IMAGE:
        sample["png"] = b"no picture"
    if number == NO_TEXT:
        del sample["txt"]
    return sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights with their config, and six shards of seven samples, of which two cannot be used."""
    folder = tmp_path_factory.mktemp("embed")
    write_model(folder)
    for shard in range(6):
        write_shard(folder / f"{shard:05d}.tar", [change(7 * shard + i) for i in range(7)])
    return folder


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    weights = ["--config-dir", f"{folder}/configs", f"weights={folder}/model.safetensors", "model=tiny"]
    return [*weights, f"data={folder}/*.tar", f"output={folder}/{output}", *SETTINGS, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """What one process writes that nothing happens to."""
    code, out, error = call(embed.main, *arguments(folder, "whole"))
    assert code == 0, error
    assert "40 samples in 6 parts" in out
    assert "left out 2 that cannot be used" in out
    return folder / "whole"


def test_every_usable_sample_is_there_once_with_its_own_embeddings(whole, folder):
    tables = [parquet.read_table(file).to_pylist() for file in sorted((whole / "metadata").glob("*.parquet"))]
    rows = [row for table in tables for row in table]
    numbers = [number for number in range(42) if number not in (BAD_IMAGE, NO_TEXT)]
    assert [row["key"] for row in rows] == [f"{number:06d}" for number in numbers]
    assert [row["caption"] for row in rows] == [make_sample(number)["txt"] for number in numbers]
    assert [row["price"] for row in rows] == [number if number % 2 else number + 0.5 for number in numbers]
    assert rows[3]["tags"] == '["a", 3]'
    for row, number in zip(rows, numbers):
        with open(row["shard"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == encode_image(number)
    for side in ("img_emb", "text_emb"):
        values = np.concatenate([np.load(file) for file in sorted((whole / side).glob("*.npy"))])
        assert values.dtype == np.float32
        assert np.linalg.norm(values, axis=1) == pytest.approx(1, abs=1e-5)
        assert len(np.unique(values, axis=0)) == len(values) == 40
    skipped = (whole / "skipped.csv").read_text().splitlines()
    assert skipped[1].startswith(f"caption_missing,{folder}/00002.tar,{NO_TEXT:06d},")
    assert skipped[2].startswith(f"image_unreadable,{folder}/00000.tar,{BAD_IMAGE:06d},")


def test_killed_in_the_middle_and_gone_on_with_by_two_processes_the_files_are_the_same(whole, folder):
    command = [sys.executable, "-m", MODULE, *arguments(folder, "cut", "data.num_workers=1")]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 600
    while not list((folder / "cut" / "metadata").glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder / "cut" / "img_emb" / "img_emb_00005.npy.1.tmp").write_bytes(b"half of it")  # as a kill can leave it
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cut" / "metadata").glob("*.parquet")}
    done = run_module(MODULE, arguments(folder, "cut", "trainer.devices=2", "data.num_workers=1"), ENV, 600)
    assert done.returncode == 0, done.stderr
    assert "were there" in done.stdout
    assert contents(folder / "cut") == contents(whole)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())


def test_the_libraries_that_clip_retrieval_and_autofaiss_use_read_the_files(whole):
    from embedding_reader import EmbeddingReader

    for side in ("img_emb", "text_emb"):
        reader = EmbeddingReader(
            str(whole / side), "parquet_npy", metadata_folder=str(whole / "metadata"), meta_columns=["caption", "price"]
        )
        assert (reader.count, reader.dimension) == (40, 32)
        pieces = list(reader(batch_size=16, show_progress=False))
        found = np.concatenate([values for values, _ in pieces])
        expected = np.concatenate([np.load(file) for file in sorted((whole / side).glob("*.npy"))])
        assert np.array_equal(found, expected)
        assert [text for _, meta in pieces for text in meta["caption"]][6] == make_sample(7)["txt"]


def test_another_model_or_other_settings_in_the_same_folder_are_one_line(whole, folder):
    before = contents(whole)
    other = {name: tensor + 1e-3 for name, tensor in ours(CLIP).state_dict().items()}
    save_file(other, folder / "other.safetensors")
    for given, message in (
        ([f"weights={folder}/other.safetensors"], "holds embeddings of another model, "),
        (["dtype=float16"], "was made with dtype=float32, not float16: give another output="),
        ([f"data={folder}/00001.tar"], "holds embeddings of other data, 6 parts from "),
        ([f"data={folder}/none.tar"], "none.tar does not exist"),
        (["data=~nouser/x.tar"], "clip-embed: error: data: shard ~nouser/x.tar does not exist"),
        (["data=" + 300 * "x"], f"clip-embed: error: data: shard {300 * 'x'} does not exist"),
        (["modality=sound"], "modality=sound is none of image, text and [image,text]"),
        (["modality=null"], "modality=None is none of image, text and [image,text]"),
        (["modality=[image,null]"], "modality=['image', None] is none of"),
        (["metadata=null"], "metadata: "),
        (["metadata=[File_index]"], "metadata: 'File_index' is a name that conditions on metadata need"),
        (["data.caption_key=null"], "caption_key"),
        (["data.image_key=tiff", f"output={folder}/new"], "image_key=tiff: no shard has such files"),
        ([f"output={folder}/00000.tar"], f"output={folder}/00000.tar is no folder"),
        (["trainer=null"], "trainer=null: the config of a group is chosen by its name"),
        ([f"output={folder}/configs"], f"output={folder}/configs holds something else than embeddings of clip-embed"),
    ):
        code, _, error = call(embed.main, *arguments(folder, "whole"), *given)
        assert code == 2
        assert error.startswith("clip-embed: error: ") and error.count("\n") == 1, error
        assert message in error
    assert contents(whole) == before


def test_a_signal_ends_it_with_the_exit_code_of_what_can_go_on(folder):
    data = f"data=pipe:cat {folder}/00000.tar::pipe:sleep 600 #.tar"
    process = WarmProcess(MODULE, arguments(folder, "stopped", data, f"data.cache_dir={folder}/cache"), ENV)
    end = time.monotonic() + 600
    while not list((folder / "stopped" / "metadata").glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error == "clip-embed: SIGINT: what is complete is kept; start it again to go on\n"


def test_a_shard_without_captions_among_others_is_left_out_and_told_of(folder, tmp_path):
    for name, keys in (("a", ("png", "txt")), ("b", ("png",))):
        samples = [make_sample(number) for number in range(3)]
        write_shard(tmp_path / f"{name}.tar", [{key: s[key] for key in ("__key__", *keys)} for s in samples])
    code, out, error = call(embed.main, *arguments(folder, "lacking", f"data={tmp_path}/*.tar"))
    assert code == 0, error
    assert "3 samples in 2 parts" in out
    skipped = (folder / "lacking" / "skipped.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in skipped[1:]] == 3 * [["caption_missing", f"{tmp_path}/b.tar"]]
    (tmp_path / "sheet.png").write_bytes(encode_image(0))
    code, _, error = call(embed.main, *arguments(folder, "mixed", f"data={tmp_path}"))
    assert (code, error.count("\n")) == (2, 1)
    assert f"has shards, and pictures too, such as {tmp_path}/sheet.png: give data='{tmp_path}/*.tar'" in error


def test_a_folder_of_pictures(folder):
    pictures = folder / "pictures"
    (pictures / "b").mkdir(parents=True)
    for number, name in enumerate(["a", "b/c", "b/d"]):
        (pictures / f"{name}.png").write_bytes(encode_image(number))
        (pictures / f"{name}.json").write_text(json.dumps({"price": number}))
    (pictures / "a.txt").write_text("first")
    more = [f"data={pictures}", "modality=image", "samples_per_part=2", "metadata=[price]", "dtype=float16"]
    code, _, error = call(embed.main, *arguments(folder, "from_pictures", *more))
    assert code == 0, error
    files = sorted((folder / "from_pictures" / "metadata").glob("*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    assert [(row["key"], row["caption"], row["price"]) for row in rows] == [
        ("a", "first", 0),
        ("b/c", None, 1),
        ("b/d", None, 2),
    ]
    assert rows[1]["image_path"] == str(pictures / "b" / "c.png")
    assert np.load(folder / "from_pictures" / "img_emb" / "img_emb_00001.npy").dtype == np.float16
    assert not (folder / "from_pictures" / "text_emb").exists()
