"""A model that has learned eight captions writes them."""

import tarfile
from pathlib import Path

import pytest
import torch

from clip_train.data.demo import unpack_demo
from clip_train.data.picture_files import find_pictures
from clip_train.data.preprocessing import preprocess
from clip_train.data.tokenizer import ClipTokenizer
from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.captioning import caption_pictures
from clip_train.losses import CaptioningLoss
from clip_train.models.captioner import Captioner
from clip_train.models.generation import CaptionOptions
from tests.models.coca import our_coca


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[Path, str]:
    """Eight emoji with different captions of one style."""
    folder, captions = tmp_path_factory.mktemp("pictures"), {}
    shard = min(Path(unpack_demo("demo:emoji/train")).glob("*.tar"))
    with tarfile.open(shard) as tar:
        for member in tar:
            if not member.name.endswith(".txt"):
                continue
            caption = tar.extractfile(member).read().decode()  # pyright: ignore[reportOptionalMemberAccess]
            if caption in captions.values() or len(captions) == 8:
                continue
            (name,) = [n for n in tar.getnames() if n.startswith(member.name[:-3]) and n.endswith((".png", ".webp"))]
            path = folder / Path(name).name
            path.write_bytes(tar.extractfile(name).read())  # pyright: ignore[reportOptionalMemberAccess]
            captions[path] = caption
    return dict(sorted(captions.items()))


@pytest.fixture(scope="module")
def model(pictures) -> Captioner:
    model = our_coca().train()
    images = torch.stack([torch.from_numpy(preprocess(path.read_bytes(), 32).copy()) for path in pictures])
    ids = torch.from_numpy(ClipTokenizer(16)(list(pictures.values())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(130):
        loss = CaptioningLoss()(*model(images.permute(0, 3, 1, 2), ids), **model.logit_parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 1}, {"generation_type": "top_p", "top_p": 0.5}, {"generation_type": "top_k"}]
)
def test_it_writes_the_captions_that_it_has_learned(model, pictures, options):
    options = CaptionOptions(**{"min_length": 0, "max_length": 16, "temperature": 0.5, **options})
    found = dict(caption_pictures(model, list(pictures), options, image_size=32, batch_size=3))
    tokenizer = ClipTokenizer(16)
    assert found == {path: tokenizer.decode(tokenizer([caption])[0]) for path, caption in pictures.items()}
    assert len(set(found.values())) == 8


def test_pictures_are_found(tmp_path):
    (tmp_path / "more").mkdir()
    paths = [tmp_path / name for name in ("b.png", "a.JPG", "more/c.webp")]
    for path in (*paths, tmp_path / "notes.txt"):
        path.write_bytes(b"")
    assert find_pictures(str(tmp_path)) == sorted(paths)
    assert find_pictures(f"{tmp_path}/*.png") == [paths[0]]
    assert find_pictures(str(paths[1])) == [paths[1]]
    with pytest.raises(ConfigError, match=r"^images=.*/\*\.gif: no such picture"):
        find_pictures(f"{tmp_path}/*.gif")
    with pytest.raises(DataError, match=r"a\.JPG: .*; leave it out$"):
        list(caption_pictures(our_coca(), [paths[1]], CaptionOptions(max_length=16), image_size=32))
