"""What `clip-eval task=NAME` calls."""

from collections.abc import Callable

from omegaconf import DictConfig

from clip_train.evaluation.knn_task import knn
from clip_train.evaluation.linear_probe_task import linear_probe
from clip_train.evaluation.loaded_model import LoadedModel
from clip_train.evaluation.moderation_task import moderation
from clip_train.evaluation.ranking_task import rank
from clip_train.evaluation.results import Results
from clip_train.evaluation.retrieval_task import long_text, retrieval
from clip_train.evaluation.robustness_task import robustness
from clip_train.evaluation.zero_shot_task import zero_shot

# Every rank calls the function with the whole config and gets the same results; the first writes what else there is to
# see into the folder `cfg.output`, which is there.
TASKS: dict[str, Callable[[LoadedModel, DictConfig], Results]] = {
    "knn": knn,
    "linear_probe": linear_probe,
    "long_text": long_text,
    "moderation": moderation,
    "rank_captions": rank,
    "retrieval": retrieval,
    "robustness": robustness,
    "zero_shot": zero_shot,
}
