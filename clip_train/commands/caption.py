"""clip-caption: captions for pictures, by a model with a decoder."""

from omegaconf import DictConfig

from clip_train.commands.program import EXIT_DONE, run_program


def main() -> None:
    """Entry point."""
    run_program("clip-caption", "caption", _caption)


def _caption(cfg: DictConfig) -> int:
    import torch
    from omegaconf import OmegaConf

    from clip_train.data.picture_files import find_pictures
    from clip_train.errors import ConfigError
    from clip_train.evaluation.captioning import caption_pictures
    from clip_train.interop.model_source import open_model
    from clip_train.models.captioner import Captioner
    from clip_train.models.generation import CaptionOptions
    from clip_train.typed_config import typed

    for key in ("weights", "images"):
        if cfg[key] is None:
            raise ConfigError(f"{key} has no value: give {key}=...")
    if isinstance(cfg.batch_size, bool) or not isinstance(cfg.batch_size, int) or cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} is not a whole number of at least 1")
    options = typed(CaptionOptions, cfg)
    pictures = find_pictures(str(cfg.images))
    model = OmegaConf.to_container(cfg.model, resolve=True) if "model" in cfg else None
    source = open_model(str(cfg.weights), model)  # pyright: ignore[reportArgumentType]
    if not isinstance(source.model, Captioner):
        raise ConfigError(f"weights={cfg.weights}: this model has no decoder; take weights of one with model.decoder")
    captions = caption_pictures(
        source.model.to("cuda" if torch.cuda.is_available() else "cpu"),
        pictures,
        options,
        image_size=source.image_size,
        resize_mode=source.resize_mode,
        interpolation=source.interpolation,
        batch_size=cfg.batch_size,
    )
    for path, caption in captions:
        print(f"{path}\t{caption}", flush=True)
    return EXIT_DONE


if __name__ == "__main__":
    main()
