"""`clip-eval task=zero_shot`: a labelled set classified by the names of its classes."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from clip_train.data.class_names import ClassNames
from clip_train.data.eval_batches import EvalBatches
from clip_train.data.files import write_atomic
from clip_train.distributed import group_rank
from clip_train.errors import ConfigError
from clip_train.evaluation.calibration import calibrate
from clip_train.evaluation.classification import (
    Classify,
    Predictions,
    class_counts,
    classification_metrics,
    classify_set,
    confusion_matrix,
)
from clip_train.evaluation.labelled_set import LabelledSet, open_labelled_set
from clip_train.evaluation.loaded_model import LoadedModel, check_numbers
from clip_train.evaluation.results import Results, writing_into
from clip_train.evaluation.zero_shot import make_classifier, make_probability_classifier, set_classes
from clip_train.typed_config import typed

ENSEMBLES = ("embedding", "probability")
TASK = "zeroshot_classification"


def zero_shot(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Classify a labelled set by the names of its classes.

    Written into `cfg.output`: `per_class.json`, `confusion_matrix.csv` and `.png`, `calibration.png`.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the set cannot be read, or the model's scores are not numbers.
    """
    chosen = typed(LabelledSet, cfg.task, "task")
    name, batches = open_labelled_set(chosen, loaded, cfg)
    classes = set_classes(batches)
    predictions = classify(loaded, batches, make_zero_shot_classifier(loaded, batches, cfg.task.ensemble))
    calibration = calibrate(predictions.confidence, predictions.rank == 0)
    metrics = {**accuracy(predictions, len(classes)), "ece": calibration.ece}
    if group_rank() == 0:
        from clip_train.evaluation.classification_pictures import draw_calibration, draw_confusion

        confusion = confusion_matrix(predictions, len(classes))
        title = f"{name}: top-1 {metrics['acc1']:.1%} of {len(batches)} pictures"
        with writing_into(Path(str(cfg.output))) as folder:
            write_atomic(folder / "per_class.json", json.dumps(_per_class(predictions, classes), indent=2).encode())
            _write_confusion(folder / "confusion_matrix.csv", confusion.tolist(), classes)
            draw_confusion(folder / "confusion_matrix.png", confusion.numpy(), classes.names, title)
            draw_calibration(folder / "calibration.png", calibration, name)
    return Results(name, TASK, metrics, language=chosen.language)


def make_zero_shot_classifier(
    loaded: LoadedModel, batches: EvalBatches, ensemble: str
) -> tuple[Classify, float | None]:
    """Pictures to scores, and what makes probabilities of them; None where they are such.

    Args:
        ensemble: what is averaged over the captions of a class: `embedding` or `probability`.

    Raises:
        ConfigError: it is neither, or not every class has equally many captions, as the second needs.
    """
    if ensemble not in ENSEMBLES:
        raise ConfigError(f"task.ensemble={ensemble} is none of {', '.join(ENSEMBLES)}")
    with loaded.autocast():
        if ensemble == "probability":
            return make_probability_classifier(loaded.model, batches, loaded.batch_size), None
        scale = loaded.model.logit_scale.exp().item()
        return make_classifier(loaded.model, batches, loaded.batch_size), scale


def classify(loaded: LoadedModel, batches: EvalBatches, classifier: tuple[Classify, float | None]) -> Predictions:
    """What the classifier says of each picture of a set.

    Raises:
        DataError: a sample cannot be used, or the scores are not numbers.
    """
    scores, logit_scale = classifier
    predictions = classify_set(
        scores,
        batches,
        batch_size=loaded.batch_size,
        num_workers=loaded.num_workers,
        autocast=loaded.autocast(),
        device=loaded.device,
        logit_scale=logit_scale,
    )
    check_numbers(predictions.confidence)
    return predictions


def accuracy(predictions: Predictions, num_classes: int) -> dict[str, float]:
    """clip-benchmark's metrics; no `acc5` with less than five classes."""
    found = classification_metrics(predictions, num_classes)
    metrics = {"acc1": found["top1"], "acc5": found["top5"], "mean_per_class_recall": found["mean_per_class_recall"]}
    if num_classes < 5:
        del metrics["acc5"]
    return metrics


def _per_class(predictions: Predictions, classes: ClassNames) -> list[dict[str, Any]]:
    """Of each class: how many pictures it has, and how many of them, and of those taken for it, were right."""
    there_are, right = class_counts(predictions, len(classes))
    _, among_five = class_counts(predictions, len(classes), top=5)
    said = predictions.predicted.bincount(minlength=len(classes))
    confusion = confusion_matrix(predictions, len(classes)).fill_diagonal_(0)
    rows = []
    for label, name in enumerate(classes.names):
        pictures, taken = int(there_are[label]), int(said[label])
        wrong = int(confusion[label].argmax())
        rows.append(
            {
                "label": label,
                "name": name,
                "pictures": pictures,
                "recall": right[label].item() / pictures if pictures else None,
                "recall_at_5": among_five[label].item() / pictures if pictures else None,
                "precision": right[label].item() / taken if taken else None,
                "most_often_taken_for": classes.names[wrong] if confusion[label, wrong] else None,
            }
        )
    return rows


def _write_confusion(path: Path, confusion: list[list[int]], classes: ClassNames) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["class", *classes.names])
    writer.writerows([name, *row] for name, row in zip(classes.names, confusion))
    write_atomic(path, text.getvalue().encode())
