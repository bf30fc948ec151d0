"""clip-export: the weights of a checkpoint, for other programs."""

from pathlib import Path

from omegaconf import DictConfig

from clip_train.commands.program import EXIT_DONE, run_program


def main() -> None:
    """Entry point."""
    run_program("clip-export", "export", _export)


def _export(cfg: DictConfig) -> int:
    from clip_train.errors import ConfigError
    from clip_train.interop.single_file import export_single_file

    for key in ("weights", "output"):
        if cfg[key] is None:
            raise ConfigError(f"{key} has no value: give {key}=...")
    count = export_single_file(Path(cfg.weights), Path(cfg.output))
    print(f"wrote {count} weights to {cfg.output}")
    return EXIT_DONE


if __name__ == "__main__":
    main()
