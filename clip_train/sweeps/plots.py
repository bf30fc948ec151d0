"""Pictures of a study: which settings matter, and which go together with good results."""

import logging
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

log = logging.getLogger(__name__)


def draw_study(study: optuna.Study, folder: Path, name: str) -> list[Path]:
    """Draw importance.png and parallel_coordinate.png, if enough trials are complete to compare.

    What cannot be drawn is said in one line of the log: it must not hide how the sweep went.

    Args:
        study: whose trials to show.
        folder: where to.
        name: of the objective.

    Returns:
        The pictures drawn.
    """
    try:
        return _draw(study, folder, name)
    except Exception as error:  # Optuna's, a database's, the disk's
        log.warning("could not draw the study: %s", (str(error) or type(error).__name__).splitlines()[0])
        return []


def _draw(study: optuna.Study, folder: Path, name: str) -> list[Path]:
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) < 2:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    # PED-ANOVA, as the default evaluator would need scikit-learn.
    evaluator = PedAnovaImportanceEvaluator()
    pictures = {
        "importance": partial(draw.plot_param_importances, evaluator=evaluator),
        "parallel_coordinate": draw.plot_parallel_coordinate,
    }
    paths = []
    for picture, plot in pictures.items():
        paths.append(folder / f"{picture}.png")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna has called these functions experimental since 2020
            plot(study, target_name=name)
        pyplot.savefig(paths[-1], bbox_inches="tight", dpi=120)
        pyplot.close()
    return paths
