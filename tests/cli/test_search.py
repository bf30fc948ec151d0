"""clip-embed and then clip-search, by the command line."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from clip_train.commands import embed, search
from clip_train.commands.program import config_dir
from tests.cli.embeddings import call, embed_shard
from tests.conftest import encode_image, make_sample, write_shard
from tests.interop.tiny import CLIP, ours

COMMANDS = ("index", "query", "serve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Embeddings of a shard of 30 samples."""
    folder = tmp_path_factory.mktemp("search")
    samples = [make_sample(i) for i in range(30)]
    for i, sample in enumerate(samples):
        sample["json"] |= {"price": i}
    samples[4]["txt"] = "a <b>bold</b> [red]thing[/red]"
    write_shard(folder / "00000.tar", samples)
    embed_shard(folder, folder / "00000.tar", "metadata=[price]")
    return folder


def test_a_picture_finds_itself_and_a_text_its_text(folder, tmp_path):
    embeddings = f"embeddings={folder}/embeddings"
    code, out, _ = call(search.main, "index", embeddings)
    assert code == 0
    assert f"{folder}/embeddings/image.index: flat, 30 images" in out
    assert "text.index: flat, 30 texts" in out

    (tmp_path / "photo.png").write_bytes(encode_image(7))
    output = f"output=[{tmp_path}/found.json,{tmp_path}/found.html,{tmp_path}/found.png]"
    code, out, err = call(search.main, "query", embeddings, f"image={tmp_path}/photo.png", "num_results=3", output)
    assert code == 0, err
    (answer,) = json.loads((tmp_path / "found.json").read_text())
    assert answer["query"] == f"{tmp_path}/photo.png"
    assert [answer["results"][0][name] for name in ("key", "price")] == ["000007", 7]
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-2)
    assert len(answer["results"]) == 3
    page = (tmp_path / "found.html").read_text()
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 4  # that asked for, and three found
    assert Image.open(io.BytesIO(base64.b64decode(pictures[1]))).size == (20, 16)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    sheet = np.asarray(Image.open(tmp_path / "found.png"), dtype=int)
    picture = np.asarray(Image.open(tmp_path / "photo.png").convert("RGB"), dtype=int)
    assert holds(sheet[64:], picture)  # what was found first, below what was asked for
    assert holds(sheet[:64], picture)

    (tmp_path / "queries.txt").write_text("a red thing number 8\n\na <b>bold</b> [red]thing[/red]\n")
    given = (f"batch={tmp_path}/queries.txt", "target=text", "where=price < 10", f"output={tmp_path}/texts.json")
    code, out, err = call(search.main, "query", embeddings, *given)
    assert code == 0, err
    assert "[red]thing[/red]" in out
    first, second = json.loads((tmp_path / "texts.json").read_text())
    assert [first["results"][0]["price"], second["results"][0]["price"]] == [8, 4]
    assert all(row["price"] < 10 for answer in (first, second) for row in answer["results"])
    code, out, err = call(
        search.main, "query", embeddings, "text=<b>", f"output={tmp_path}/text.html", "num_results=30"
    )
    assert code == 0, err
    assert "<b>" not in (tmp_path / "text.html").read_text()


def holds(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture is somewhere in another, to rounding."""
    height, width = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width), axis=(0, 1))
    corners = np.argwhere((abs(windows[..., 0, 0] - picture[0, 0]) <= 2).all(axis=-1))
    return any((abs(sheet[y : y + height, x : x + width] - picture) <= 2).all() for y, x in corners.tolist())


def test_the_model_is_found_from_elsewhere_and_is_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    data = [f"data={folder}/00000.tar", "data.num_workers=0", "trainer.accelerator=cpu", "modality=text"]
    given = ["--config-dir", "configs", "model=tiny", "weights=model.safetensors", f"output={tmp_path}/relative"]
    code, _, error = call(embed.main, *given, *data)
    assert code == 0, error
    monkeypatch.chdir(tmp_path)
    query = ["query", f"embeddings={tmp_path}/relative", "text=x", "target=text"]
    code, _, error = call(search.main, *query)
    assert code == 0, error
    (folder / "configs" / "model" / "other.yaml").write_text(json.dumps(CLIP | {"image_mean": [0.1, 0.1, 0.1]}))
    code, _, error = call(search.main, "query", "--config-dir", f"{folder}/configs", *query[1:], "model=other")
    assert (code, error.count("\n")) == (2, 1)
    assert f"model= is another than that of embeddings={tmp_path}/relative" in error


def test_user_errors(folder, tmp_path):
    embeddings, text = f"embeddings={folder}/embeddings", "text=x"
    for command, given, message in (
        ("index", (), "embeddings has no value: give embeddings=..."),
        ("index", (f"embeddings={tmp_path}",), "holds none (img_emb/*.npy, text_emb/*.npy): write them by clip-embed"),
        ("index", (embeddings, "kind=best"), "kind=best is none of auto, flat, hnsw, ivf_pq"),
        ("query", (embeddings,), "give exactly one of text=, image= and batch="),
        ("query", (embeddings, "image=/none.jpg"), "image=/none.jpg: no such picture"),
        ("query", (embeddings, "batch=/none.txt"), "/none.txt cannot be read: No such file"),
        ("query", (embeddings, f"image={folder}/00000.tar"), "is no readable picture"),
        ("query", (embeddings, text, "target=sound"), "target=sound: embeddings="),
        ("query", (embeddings, text, "output=found.pdf"), "output=found.pdf is none of .html, .json"),
        ("query", (embeddings, text, "where=pric < 3"), 'where=pric < 3: Binder Error: Referenced column "pric" not'),
        ("query", (embeddings, text, "num_results=0"), "num_results=0 is not a whole number"),
        ("query", (embeddings, text, "deduplicate=2"), "deduplicate=2 is no cosine"),
        ("query", (embeddings, text, "weights=/none"), "weights=/none"),
        ("serve", (embeddings, "port=99999"), "host=127.0.0.1 port=99999 cannot be listened on: "),
        ("querry", (), "querry: no such command; did you mean query?"),
    ):
        code, _, error = call(search.main, command, *given)
        assert (code, error.count("\n")) == (2, 1), error
        assert message in error
    other = {name: tensor + 1e-3 for name, tensor in ours(CLIP).state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    assert (
        "are not those of" in call(search.main, "query", embeddings, text, f"weights={tmp_path}/other.safetensors")[2]
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_key(command):
    code, out, _ = call(search.main, command, "--help")
    assert code == 0
    config = OmegaConf.load(f"{config_dir()}/search_{command}.yaml")
    keys = [key for key in config if key not in ("defaults", "hydra")]
    explained = out.partition("keys:")[2].partition("defaults:")[0]
    assert set(keys) <= {line.split()[0] for line in explained.splitlines() if line.strip()}
    assert f"\n  {command} " in call(search.main, "--help")[1]
