"""Interpolated positions against computations written out on their own."""

import numpy as np
import pytest
import torch
from PIL import Image

from clip_train.models import create_dual_encoder
from clip_train.models.positions import resize_image_positions, stretch_text_positions
from tests.models.test_dual_encoder import TINY


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(3, 3), (14, 14), (9, 12)])
def test_image_positions_are_resized_as_a_picture_is(grid):
    positions = random(1, 1 + 49, 4)
    resized = resize_image_positions(positions, grid, prefix_tokens=1)
    assert torch.equal(resized[:, 0], positions[:, 0])
    pictures = positions[0, 1:].T.reshape(4, 7, 7).numpy()
    for channel, picture in enumerate(pictures):  # Pillow's bicubic is antialiased, too
        expected = Image.fromarray(picture).resize(grid[::-1], Image.Resampling.BICUBIC)
        assert np.allclose(resized[0, 1:, channel].reshape(grid), np.asarray(expected), atol=1e-5)
    assert torch.equal(resize_image_positions(positions[0], grid, prefix_tokens=1), resized[0])


def test_the_same_size_changes_nothing():
    positions = random(1, 49, 4)
    assert torch.equal(resize_image_positions(positions, (7, 7), prefix_tokens=0), positions)
    assert torch.equal(stretch_text_positions(positions[0], 49), positions[0])


def test_positions_of_no_square():
    with pytest.raises(ValueError, match="48 positions beside 1"):
        resize_image_positions(random(1, 49, 4), (14, 14), prefix_tokens=1)


def long_clip(old: torch.Tensor, keep: int = 20, times: int = 4) -> torch.Tensor:
    """Long-CLIP's own sums: quarters between neighbours, the last three go on where the line leads."""
    new = [old[i] for i in range(keep)]
    for i in range(keep, len(old)):
        a, b = (old[i], old[i + 1]) if i + 1 < len(old) else (old[i], 2 * old[i] - old[i - 1])
        new += [((times - k) * a + k * b) / times for k in range(times)]
    return torch.stack(new)


def test_text_positions_are_long_clips():
    positions = random(77, 8)
    stretched = stretch_text_positions(positions, 248)
    assert stretched.shape == (248, 8)
    assert torch.allclose(stretched, long_clip(positions), atol=1e-6)


@pytest.mark.parametrize(("old", "new", "kept"), [(77, 100, 20), (64, 65, 20), (16, 64, 1), (21, 40, 1)])
def test_other_lengths_keep_the_first_and_stay_on_the_line(old, new, kept):
    line = torch.arange(old)[:, None] * random(1, 3)
    stretched = stretch_text_positions(line, new)
    assert torch.equal(stretched[:kept], line[:kept])
    steps = stretched[kept - 1 :].diff(dim=0)[1:]
    assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-5)


def test_shorter_texts_take_the_first():
    positions = random(77, 8)
    assert torch.equal(stretch_text_positions(positions, 16), positions[:16])


def test_a_model_takes_larger_images_and_longer_texts():
    small, large = (
        create_dual_encoder(**{**TINY, "image_size": size, "text": {**TINY["text"], "context_length": length}}).eval()
        for size, length in ((32, 30), (64, 40))
    )
    weights = small.state_dict()
    vision, text = "vision.trunk.pos_embed", "text.trunk.embeddings.position_embedding.weight"
    weights[vision] = resize_image_positions(weights[vision], (4, 4), prefix_tokens=1)
    weights[text] = stretch_text_positions(weights[text], 40)
    large.load_state_dict(weights)
    ids = torch.zeros(2, 40, dtype=torch.long)
    ids[:, :6] = torch.tensor([5, 6, 7, 8, 9, 49407])
    with torch.no_grad():  # within the first 20 positions nothing has changed
        assert torch.allclose(large.encode_text(ids), small.encode_text(ids[:, :30]), atol=1e-6)
        assert large.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 32)
