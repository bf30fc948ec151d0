"""`clip-eval task=robustness`: how much of the zero-shot accuracy is left when pictures are made worse."""

from collections.abc import Callable
from dataclasses import replace

from omegaconf import DictConfig

from clip_train.data.decoding import Pixels
from clip_train.evaluation.calibration import calibrate
from clip_train.evaluation.corruptions import Corruptions
from clip_train.evaluation.labelled_set import LabelledSet, open_labelled_set
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.results import Results
from clip_train.evaluation.zero_shot import set_classes
from clip_train.evaluation.zero_shot_task import TASK, accuracy, classify, make_zero_shot_classifier
from clip_train.typed_config import typed


def robustness(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Classify a labelled set as it is and under each corruption.

    The metrics are those of `zero_shot` and `mean_corrupted_acc1`; the variants, the same under each corruption.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the set cannot be read, or the model's scores are not numbers.
    """
    chosen, corruptions = typed(LabelledSet, cfg.task, "task"), typed(Corruptions, cfg.task, "task")
    name, batches = open_labelled_set(chosen, loaded, cfg)
    classifier, num_classes = make_zero_shot_classifier(loaded, batches, cfg.task.ensemble), len(set_classes(batches))

    def measured(change: Callable[[Pixels], Pixels] | None) -> dict[str, float]:
        said = classify(loaded, replace(batches, change=change), classifier)
        return {**accuracy(said, num_classes), "ece": calibrate(said.confidence, said.rank == 0).ece}

    metrics = measured(None)
    variants = {corruption: measured(change) for corruption, change in corruptions.named().items()}
    metrics["mean_corrupted_acc1"] = sum(variant["acc1"] for variant in variants.values()) / len(variants)
    return Results(name, TASK, metrics, variants, chosen.language)
