"""Batches of cached features: the samples that pictures would have come from."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from clip_train.data.batches import BadSample
from clip_train.data.feature_batches import FeatureBatches, FeatureTable, chunk_parts, write_chunk
from clip_train.errors import DataError
from tests.data.test_labels import labelled_batches
from tests.labelled import make_labelled


def write_table(folder: Path, labels: list[int], bad=()) -> FeatureTable:
    """Sample n has the features [n, n]."""
    folder.mkdir()
    features = np.repeat(np.arange(len(labels), dtype=np.float32)[:, None], 2, axis=1)
    for number, part in enumerate(chunk_parts(len(labels))):
        write_chunk(folder, number, features[part.start : part.stop], labels[part.start : part.stop], bad)
    return FeatureTable.open(folder, len(labels))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 100_000])
def test_parts_cover_a_set_once(count):
    parts = chunk_parts(count)
    assert [n for part in parts for n in part] == list(range(count))
    assert len({len(part) for part in parts[:-1]}) <= 1 and len(parts) <= 256


def test_the_same_samples_and_labels_as_of_pictures(tmp_path):
    pictures = labelled_batches(make_labelled(tmp_path / "set", [10, 11]), 18)
    table = write_table(tmp_path / "features", [n % 7 for n in range(21)])
    for rank in range(3):
        mine = replace(pictures, rank=rank, world_size=3)
        for start in (0, 18, 180):
            expected, found = mine[start], cast(Any, FeatureBatches(table, mine)[start])
            assert found["names"] == expected["names"]
            assert found["label"].tolist() == expected["label"].tolist()
            assert [int(n) % 7 for n in found["features"][:, 0]] == expected["label"].tolist()
            assert len(found["image"]) == 6 and not found["error"]


def test_bad_samples_are_replaced_as_they_are_with_pictures(tmp_path):
    def damage(sample: dict) -> dict:
        return sample | ({"cls": "9"} if sample["__key__"] in ("000004", "000009") else {})

    pictures = labelled_batches(make_labelled(tmp_path / "set", [10, 11], damage))
    expected = pictures[21]
    by_key: dict[str, BadSample] = {sample.key: sample for sample in expected["bad"]}
    labels = [-1 if n in (4, 9) else n % 7 for n in range(21)]
    table = write_table(tmp_path / "features", labels, [by_key["000004"], by_key["000009"]])
    found = FeatureBatches(table, pictures)[21]
    assert found["bad"] == expected["bad"] and len(found["bad"]) == 2
    assert found["names"] == expected["names"]
    nothing = FeatureTable(table.chunks, np.full(21, -1), dict.fromkeys(range(21), by_key["000004"]))
    assert "unusable samples in a row" in FeatureBatches(nothing, pictures)[0]["error"]


def test_features_that_are_damaged_are_named(tmp_path):
    write_table(tmp_path / "features", [0] * 300)
    with pytest.raises(DataError, match="are of 300 samples, not 299"):
        FeatureTable.open(tmp_path / "features", 299)
    (tmp_path / "features" / "00001.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"00001.npy cannot be read .*: remove"):
        FeatureTable.open(tmp_path / "features", 300)
