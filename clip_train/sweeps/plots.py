"""Pictures of a study: which settings matter, and which go together with good results."""

import logging
import warnings
from pathlib import Path

import matplotlib
import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState

log = logging.getLogger(__name__)


def draw_study(study: optuna.Study, folder: Path, name: str) -> list[Path]:
    """Draw importance.png and parallel_coordinate.png, if enough trials are complete to compare.

    Args:
        study: whose trials to show.
        folder: where to.
        name: of the objective.

    Returns:
        The pictures drawn.
    """
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if len({trial.value for trial in complete}) < 2:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as draw

    paths = folder / "importance.png", folder / "parallel_coordinate.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls these functions experimental, since 2020
        # PED-ANOVA, as the default would need scikit-learn.
        importance = draw.plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target_name=name)
        parallel = draw.plot_parallel_coordinate(study, target_name=name)
        for axes, path in zip((importance, parallel), paths):
            axes.figure.savefig(path, bbox_inches="tight", dpi=120)
            pyplot.close(axes.figure)
    return list(paths)
