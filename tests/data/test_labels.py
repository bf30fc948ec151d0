"""Training batches of labelled shards."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import TrainBatches
from clip_train.data.class_names import ClassNames
from clip_train.data.index import load_indexes
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.shards import expand_shards
from clip_train.data.tokenizer import ClipTokenizer
from tests.labelled import CLASSES, TEMPLATES, make_labelled

NAMES = ClassNames(CLASSES, TEMPLATES)


def labelled_batches(pattern: str, batch_size: int = 21, rank: int = 0, world_size: int = 1) -> Any:
    reader = PairReader(load_indexes(expand_shards(pattern, "x")), "png", "cls", classes=NAMES)
    order = SampleOrder(reader.counts, seed=0, lanes=3, window=5)
    tokenizer = ClipTokenizer(16)
    return TrainBatches(
        reader, order, Augmentation(), tokenizer, 16, batch_size, rank, world_size, with_names=True, with_labels=True
    )


def number_of(name: str) -> int:
    """Of a sample in the shards of 10 and 11."""
    return 10 * int(name.split(".tar[")[0][-5:]) + int(name.split("[")[1][:-1])


def test_labels_and_captions_of_the_class_belong_to_the_sample(tmp_path):
    batches = labelled_batches(make_labelled(tmp_path, [10, 11]))
    seen = set()
    for start in range(0, 21 * 8, 21):
        batch = batches[start]
        labels = [number_of(name) % 7 for name in batch["names"]]
        assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == labels
        for label, ids in zip(labels, batch["text"]):
            rows = batches.tokenizer(NAMES.captions(label)).tolist()
            seen.add((label, rows.index(ids.tolist())))
    assert len(seen) == 7 * 3  # every class in every template, over the epochs
    again = labelled_batches(str(tmp_path / "*.tar"))
    assert torch.equal(again[42]["text"], batches[42]["text"]) and torch.equal(again[42]["label"], batches[42]["label"])


def test_ranks_share_the_labels_of_the_batch(tmp_path):
    pattern = make_labelled(tmp_path, [10, 11])
    whole = labelled_batches(pattern, 18)[18]
    parts = [labelled_batches(pattern, 18, rank, 3)[18] for rank in range(3)]
    found = sorted((name, label) for part in parts for name, label in zip(part["names"], part["label"].tolist()))
    assert found == sorted(zip(whole["names"], whole["label"].tolist()))


def test_without_labels_asked_for_there_are_none(tmp_path):
    assert "label" not in replace(labelled_batches(make_labelled(tmp_path, [10])), with_labels=False)[0]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("", "label_missing"),
        (" \n", "label_missing"),
        ("cat", "label_not_a_number"),
        ("1.0", "label_not_a_number"),
        ("\u00b2", "label_not_a_number"),
        ("7", "label_out_of_range"),
        ("-1", "label_out_of_range"),
        ("9" * 10_000, "label_out_of_range"),
    ],
)
def test_bad_labels_are_replaced_and_counted_by_kind(tmp_path, content, kind):
    def damage(sample: dict) -> dict:
        return sample | ({"cls": content} if sample["__key__"] == "000003" else {})

    batch = labelled_batches(make_labelled(tmp_path, [10, 11], damage))[0]
    assert batch["error"] == ""
    assert [(sample.kind, sample.key) for sample in batch["bad"]] == [(kind, "000003")]
    assert sorted(map(number_of, batch["names"])) == sorted([*range(3), 4, *range(4, 21)])


def test_blanks_around_a_label_do_not_matter(tmp_path):
    pattern = make_labelled(tmp_path, [10, 11], lambda sample: sample | {"cls": f" {sample['cls']}\n"})
    batch = labelled_batches(pattern)[0]
    assert not batch["bad"] and batch["label"].tolist() == [number_of(name) % 7 for name in batch["names"]]
