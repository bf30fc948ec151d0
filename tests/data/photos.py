"""A real photograph, which comes with a package that is installed anyway."""

import io

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image


def photographs() -> list[Image.Image]:
    """Parts of the portrait that comes with matplotlib: all of it, 512 x 600, its lower part, and the head enlarged."""
    portrait = Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))).convert("RGB")
    lower, head = portrait.crop((0, 250, 512, 600)), portrait.crop((130, 20, 450, 280))
    return [portrait, lower, head.resize((800, 650), Image.Resampling.BICUBIC)]


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures of bytes, in dB."""
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean()))
