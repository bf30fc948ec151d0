"""Which weights a query's model is read from."""

import dataclasses

import pytest
import torch

from clip_train.checkpoints.folder import MANIFEST
from clip_train.embedding.manifest import Manifest
from clip_train.errors import ConfigError
from clip_train.interop.joining import WeightSource
from clip_train.search import encoder
from tests.search.folders import make_folder, unit_vectors


@pytest.fixture
def asked_for(monkeypatch) -> list[WeightSource]:
    """The weights that were opened, of which there are none."""
    sources = []

    def open_model(source: WeightSource, config: object) -> None:
        sources.append(source)
        raise ConfigError("there are none")

    monkeypatch.setattr(encoder, "open_model", open_model)
    return sources


def test_averages_and_the_base_of_an_adapter_are_asked_for_again(tmp_path, asked_for):
    weights = {"weights": "/run/a", "ema": True, "base": "/run/base", "model": {"embed_dim": 16}, "sha256": "0"}
    folder = make_folder(tmp_path / "embeddings", unit_vectors(30, 16))
    folder = dataclasses.replace(folder, manifest=Manifest(weights, {}, []))
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    for path in (checkpoint, exported):
        path.mkdir()
    (checkpoint / MANIFEST).write_text("{}")
    for given in (None, str(checkpoint), str(exported)):
        with pytest.raises(ConfigError, match="there are none"):
            encoder.QueryEncoder.open(folder, given, None, torch.device("cpu"))
    assert asked_for == [
        WeightSource("/run/a", ema=True, base="/run/base"),
        WeightSource(str(checkpoint), ema=True, base="/run/base"),
        WeightSource(str(exported), ema=False, base="/run/base"),  # what is exported of averages is no checkpoint
    ]
