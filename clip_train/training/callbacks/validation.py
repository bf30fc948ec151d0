"""Retrieval and zero-shot classification on sets of their own, during training and at its end."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from clip_train.data.class_names import ClassNames
from clip_train.data.eval_batches import EvalBatches
from clip_train.errors import ConfigError
from clip_train.evaluation import classification
from clip_train.evaluation.classification import Predictions, classification_metrics, classify_set, confusion_matrix
from clip_train.evaluation.features import Features, encode_pairs
from clip_train.evaluation.retrieval import METRICS, retrieval_metrics
from clip_train.evaluation.zero_shot import evaluating, make_classifier, set_classes
from clip_train.training.callbacks.metrics import TrainMetrics, log_metrics
from clip_train.training.durations import passes
from clip_train.training.fsdp import whole_weights
from clip_train.training.module import ClipModule
from clip_train.training.optim.ema import WeightAverage

log = logging.getLogger(__name__)

AfterEvaluation = Callable[[L.Trainer, ClipModule, Mapping[str, float]], None]


class Validation(Callback):
    """Logs `val/<set>/...` and `zero_shot/<set>/...` every `every_samples` samples and when the run is complete.

    Args:
        sets: validation sets of pairs by name.
        labelled: sets to classify by name.
        every_samples: cadence; None evaluates at the end only.
        batch_size: pairs per forward pass on a rank.
        num_workers: loader processes.
        pictures: the folder where the last evaluation draws the first set's retrieval, and what is taken for what in
            the labelled sets; None for no pictures.
        metrics: whose clock stands still meanwhile.
        average: of the weights, evaluated in their place; None evaluates the weights.
        after: are told of all sets' metrics, on every rank.
        owed: the run goes on from a checkpoint without metrics: an evaluation that was due there is made up.

    Attributes:
        latest: the newest metrics of all sets.
    """

    def __init__(
        self,
        sets: Mapping[str, EvalBatches],
        labelled: Mapping[str, EvalBatches],
        *,
        every_samples: int | None,
        batch_size: int,
        num_workers: int,
        pictures: Path | None,
        metrics: TrainMetrics,
        average: WeightAverage | None = None,
        after: Sequence[AfterEvaluation],
        owed: bool = False,
    ) -> None:
        self.metrics, self.average, self.after, self.owed = metrics, average, after, owed
        self.sets, self.labelled, self.every_samples, self.pictures = sets, labelled, every_samples, pictures
        self.batch_size, self.num_workers = batch_size, num_workers
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if self.owed and pl_module.samples_seen:
            self._evaluate_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module: ClipModule, outputs, batch, batch_idx) -> None:
        self._evaluate_if_due(trainer, pl_module)

    def _evaluate_if_due(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if passes(pl_module.samples_seen, pl_module.clock.batch_size, self.every_samples) and not trainer.should_stop:
            with self.metrics.paused(trainer):
                self._evaluate(trainer, pl_module, final=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: ClipModule) -> None:
        if pl_module.samples_seen >= pl_module.clock.total_samples:
            self._evaluate(trainer, pl_module, final=True)

    def _evaluate(self, trainer: L.Trainer, pl_module: ClipModule, final: bool) -> None:
        with self.average.in_place_of_weights(pl_module) if self.average else nullcontext():
            self._evaluate_sets(trainer, pl_module, final)
            self._classify_sets(trainer, pl_module, final)
        if self.sets or self.labelled:
            for told in self.after:
                told(trainer, pl_module, self.latest)

    def _evaluate_sets(self, trainer: L.Trainer, pl_module: ClipModule, final: bool) -> None:
        for number, (name, batches) in enumerate(self.sets.items()):
            with whole_weights(pl_module.model):
                features = encode_pairs(
                    pl_module.model,
                    batches,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    autocast=trainer.precision_plugin.forward_context(),
                )
            scores = retrieval_metrics(features, pl_module.model.logit_scale.exp().item())
            metrics = {f"val/{name}/{key}": value for key, value in scores.items()}
            self.latest.update(metrics)
            log_metrics(trainer, pl_module.samples_seen, metrics)
            log.info("%s", _sentence(name, len(batches), scores))
            if final and number == 0:
                said = _sentence(name, len(batches), scores)
                self._draw(trainer, "retrieval.png", partial(_draw_retrieval, said, batches, features))

    def _classify_sets(self, trainer: L.Trainer, pl_module: ClipModule, final: bool) -> None:
        precision = trainer.precision_plugin
        for name, batches in self.labelled.items():
            with whole_weights(pl_module.model), evaluating(pl_module.model):
                with precision.forward_context():
                    classify = make_classifier(pl_module.model, batches, self.batch_size)
                predictions = classify_set(
                    classify,
                    batches,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    autocast=precision.forward_context(),
                    device=pl_module.device,
                )
            classes = set_classes(batches)
            scores = classification_metrics(predictions, len(classes))
            metrics = {f"zero_shot/{name}/{key}": value for key, value in scores.items()}
            self.latest.update(metrics)
            log_metrics(trainer, pl_module.samples_seen, metrics)
            top1, top5 = scores["top1"], scores["top5"]
            said = f"{name}: top-1 {top1:.1%}, top-5 {top5:.1%} of {len(batches)} pictures"
            log.info("%s", said)
            if final and len(classes) <= classification.MOST_CONFUSED:
                self._draw(trainer, f"confusion_{name}.png", partial(_draw_confusion, said, predictions, classes))

    def _draw(self, trainer: L.Trainer, name: str, draw: Callable[[Path], None]) -> None:
        if self.pictures is None or not trainer.is_global_zero:
            return
        path = self.pictures / name
        try:
            draw(path)
        except OSError as error:  # a full disk must not end a run
            log.error("COULD NOT DRAW %s: %s", path, error.strerror or error)
        else:
            log.info("drew %s", path)


# matplotlib is imported when something is drawn: it takes a second
def _draw_retrieval(title: str, batches: EvalBatches, features: Features, path: Path) -> None:
    from clip_train.evaluation.picture import draw_retrieval

    draw_retrieval(path, title, batches, Features(features.image.cpu(), features.text.cpu()))


def _draw_confusion(title: str, predictions: Predictions, classes: ClassNames, path: Path) -> None:
    from clip_train.evaluation.classification_pictures import draw_confusion

    draw_confusion(path, confusion_matrix(predictions, len(classes)).numpy(), classes.names, title)


def check_best_metric(metric: str | None, sets: Iterable[str], labelled: Iterable[str] = ()) -> None:
    """Refuse a `checkpoint.best_metric` that no evaluation of these sets measures.

    Raises:
        ConfigError: it names those there are.
    """
    known = [f"val/{name}/{key}" for name in sets for key in METRICS]
    known += [f"zero_shot/{name}/{key}" for name in labelled for key in classification.METRICS]
    if metric is not None and metric not in known:
        there_are = (
            f"there are {', '.join(known)}"
            if known
            else "there is no validation set: give data.val.shards or eval.zero_shot"
        )
        raise ConfigError(f"checkpoint.best_metric={metric}: no such metric; {there_are}")


def _sentence(name: str, count: int, scores: Mapping[str, float]) -> str:
    to_text, to_image = scores["image_to_text_recall@1"], scores["text_to_image_recall@1"]
    return f"{name}: recall@1 among {count} pairs: image to text {to_text:.1%}, text to image {to_image:.1%}"
