"""clip-eval: how good a model is, and the page that shows a run."""

from datetime import timedelta

from omegaconf import DictConfig

from clip_train.commands.program import EXIT_DONE, run_program

_LONGEST_WAIT = timedelta(days=1)  # of a rank that has an error to tell for the others to finish


def main() -> None:
    """Entry point."""
    run_program("clip-eval", "eval", _evaluate, short={"data": "data.path"})


def _evaluate(cfg: DictConfig) -> int:
    from pathlib import Path

    from omegaconf import OmegaConf

    from clip_train.commands.console import log_to_terminal
    from clip_train.distributed import agreed, group_rank, of_first_rank
    from clip_train.errors import ConfigError
    from clip_train.evaluation.loaded_model import load_model
    from clip_train.evaluation.results import print_results, write_results, writing_into
    from clip_train.evaluation.tasks import TASKS
    from clip_train.interop.joining import WeightSource
    from clip_train.interop.model_source import open_model
    from clip_train.report.run_report import write_report
    from clip_train.training.launch import find_world, join_ranks, num_workers

    if cfg.report is not None:
        print(f"wrote {write_report(str(cfg.report))}")
        return EXIT_DONE
    for key, value in (("weights", cfg.weights), ("data", cfg.data.path)):
        if value is None:
            raise ConfigError(f"{key} has no value: give {key}=...")
    if cfg.task.name not in TASKS:
        raise ConfigError(f"task.name={cfg.task.name} is none of {', '.join(TASKS)}")
    world = find_world(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.num_nodes)
    console = log_to_terminal(first_rank=world.rank == 0)
    workers = num_workers(cfg.data.num_workers, world, "data.num_workers")
    model = OmegaConf.to_container(cfg.model, resolve=True) if "model" in cfg else None
    weights = WeightSource(str(cfg.weights), ema=bool(cfg.ema), base=cfg.base and str(cfg.base))
    device = join_ranks(world, _LONGEST_WAIT)
    with agreed():
        source = open_model(weights, model)  # pyright: ignore[reportArgumentType]
        loaded = load_model(
            source,
            device,
            precision=str(cfg.precision),
            compile=bool(cfg.compile),
            batch_size=cfg.batch_size,
            num_workers=workers,
        )
    cfg.output = of_first_rank(str(cfg.output))  # its time is not of the same second everywhere
    folder = Path(cfg.output)
    with agreed(), writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
    results = TASKS[cfg.task.name](loaded, cfg)
    if group_rank() == 0:
        with writing_into(folder):
            write_results(results, folder, _model_name(cfg, source.manifest), str(cfg.weights))
        print_results(results, console)
        print(f"wrote {folder}/results.json and results.csv")
    return EXIT_DONE


def _model_name(cfg: DictConfig, manifest) -> str:
    """What the model is called in tables: the choice of the group `model`, here or when it was trained."""
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices.get("model")
    trained = manifest.about.get("config", {}).get("model_name") if manifest else None
    return str(chosen or trained or "model")


if __name__ == "__main__":
    main()
