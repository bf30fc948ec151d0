"""`clip-eval task=knn`: images classified by their nearest neighbours among labelled ones."""

from dataclasses import dataclass

from omegaconf import DictConfig

from clip_train.distributed import agreed
from clip_train.errors import ConfigError
from clip_train.evaluation.frozen_features import gather_predictions, judged, open_probe
from clip_train.evaluation.knn import knn_scores, rank_by_votes
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.results import Results
from clip_train.evaluation.zero_shot_task import accuracy
from clip_train.typed_config import typed


@dataclass(frozen=True)
class NeighbourOptions:
    """How neighbours vote.

    Attributes:
        k: how many; several for as many figures.
        temperature: votes weigh exp(cosine / temperature).
    """

    k: list[int]
    temperature: float

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"task.k={self.k} is not a list of numbers of at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"task.temperature={self.temperature} is not above 0")


def knn(loaded: LoadedModel, cfg: DictConfig) -> Results:
    """Weighted nearest neighbours, as DINO is evaluated: the metrics are of the first k, with a variant for
    each further one.

    Raises:
        ConfigError: a value cannot be used.
        DataError: a set cannot be read.
    """
    options = typed(NeighbourOptions, cfg.task, "task")
    probe = open_probe(loaded, cfg)
    said = {k: [] for k in options.k}
    with agreed():
        bank, bank_labels = probe.train.take(slice(None), loaded.device)
        features, labels = probe.test.take_share(loaded.device)
        start = 0
        for shares in knn_scores(features, bank, bank_labels, probe.num_classes, options.k, options.temperature):
            own = labels[start : start + len(shares[options.k[0]])]
            start += len(own)
            for k, found in shares.items():
                said[k].append(judged(found, own, rank_by_votes(found, own)))
    count = len(probe.test.labels)
    found = {k: accuracy(gather_predictions(rows, count, loaded.device), probe.num_classes) for k, rows in said.items()}
    first, *others = ({**metrics, "k": k} for k, metrics in found.items())
    return Results(probe.name, "knn", first, {f"k={metrics['k']}": metrics for metrics in others})
