"""clip-export: weights for other programs."""

from pathlib import Path

from omegaconf import DictConfig

from clip_train.commands.program import EXIT_DONE, run_program


def main() -> None:
    """Entry point."""
    run_program("clip-export", "export", _export)


def _export(cfg: DictConfig) -> int:
    from omegaconf import OmegaConf

    from clip_train.errors import ConfigError
    from clip_train.interop.exporting import export
    from clip_train.interop.joining import WeightSource

    for key in ("weights", "output"):
        if cfg[key] is None:
            raise ConfigError(f"{key} has no value: give {key}=...")
    model = OmegaConf.to_container(cfg.model, resolve=True) if "model" in cfg else None
    source = WeightSource(
        str(cfg.weights),
        ema=bool(cfg.ema),
        base=cfg.base and str(cfg.base),
        interpolate=cfg.interpolate and str(cfg.interpolate),
        alpha=cfg.alpha,
    )
    written = export(source, Path(str(cfg.output)), str(cfg.format), model)  # pyright: ignore[reportArgumentType]
    print(f"wrote {written}")
    return EXIT_DONE


if __name__ == "__main__":
    main()
