"""`hydra/sweeper=grid` and `hydra/sweeper=optuna`: Hydra takes plug-ins from this package only.

Every start of a program imports this file, so it imports little.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _ClipTrainSweeper(Sweeper):
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from clip_train.sweeps.sweep import name_sweep_folder

        name_sweep_folder(config)
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)


class GridSweeper(_ClipTrainSweeper):
    """Every combination; configs/hydra/sweeper/grid.yaml."""

    def sweep(self, arguments: list[str]) -> None:
        from clip_train.sweeps.sweep import sweep_grid

        sweep_grid(self, arguments)


class OptunaSweeper(_ClipTrainSweeper):
    """A search; configs/hydra/sweeper/optuna.yaml."""

    def sweep(self, arguments: list[str]) -> None:
        from clip_train.sweeps.sweep import sweep_optuna

        sweep_optuna(self, arguments)
