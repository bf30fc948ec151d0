"""Real photographs that come with packages the tests install anyway."""

import io

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs() -> list[Image.Image]:
    """A portrait, 512 x 600, and a temple and a flower, 640 x 427."""
    portrait = Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    return [portrait, *(Image.fromarray(np.asarray(image)) for image in load_sample_images().images)]


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures of bytes, in dB."""
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))
