"""Small folders of embeddings, made without a model."""

from pathlib import Path

import numpy as np

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.embedding.options import IMAGE
from clip_train.embedding.part_files import write_part


def unit_vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Around a hundred centres, as what a model makes lies in clusters."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(100, width))
    vectors = centres[generator.integers(100, size=count)] + 0.4 * generator.normal(size=(count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_folder(path: Path, vectors: np.ndarray, parts: int = 3) -> EmbeddingFolder:
    """Sample i has the key `i`, the price i, the colour `red` or `blue`, and none of these if 7 divides i."""
    for number, numbers in enumerate(np.array_split(np.arange(len(vectors)), parts)):
        rows = [
            {
                "key": str(i),
                "image_path": f"{i}.png",
                "caption": f"thing {i}",
                "shard": "",
                "offset": -1,
                "size": 0,
                "price": i if i % 7 else None,
                "colour": ("red" if i % 2 else "blue") if i % 7 else None,
            }
            for i in numbers.tolist()
        ]
        write_part(path, number, "stamp", {IMAGE: vectors[numbers]}, rows, ["price", "colour"], [])
    return EmbeddingFolder.open(path)
