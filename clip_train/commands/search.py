"""clip-search: an index of embeddings, queries, and a page to ask them in."""

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from clip_train.commands.program import EXIT_DONE
from clip_train.commands.subcommands import run_commands
from clip_train.errors import ConfigError, DataError
from clip_train.typed_config import typed

if TYPE_CHECKING:  # imports stay inside the functions: see program.py
    from clip_train.embedding.folder import EmbeddingFolder
    from clip_train.search.encoder import QueryEncoder

_USAGE = """\
clip-search finds pictures and texts in the embeddings that clip-embed wrote.

usage: clip-search COMMAND [key=value ...]

commands (clip-search COMMAND --help shows the keys of each):
  index    what makes search in many embeddings fast
  query    the samples nearest to a text or a picture
  serve    a page in which a text is typed or a picture dropped

examples:
  clip-search index embeddings=embeddings
  clip-search query embeddings=embeddings text='a red shoe' where="price < 20" output=found.html
  clip-search query embeddings=embeddings image=photo.jpg target=text
  clip-search serve embeddings=embeddings

Tab completion: eval "$(clip-search -sc install=bash)"
"""


def main() -> None:
    """Entry point."""
    run_commands("clip-search", "search", _USAGE, _COMMANDS)


def _index(cfg: DictConfig) -> int:
    from clip_train.data.shard_cache import readable_bytes
    from clip_train.embedding.folder import EmbeddingFolder
    from clip_train.search.index import IndexOptions, build_index, index_path

    options, folder = typed(IndexOptions, cfg), EmbeddingFolder.open(str(cfg.embeddings))
    for side in folder.embeddings:
        about = build_index(folder, side, options)
        path = index_path(folder.path, side)
        print(f"{path}: {about.kind}, {about.count:,} {side}s, {readable_bytes(path.stat().st_size)}", flush=True)
    return EXIT_DONE


def _query(cfg: DictConfig) -> int:
    from rich.console import Console

    from clip_train.embedding.folder import EmbeddingFolder
    from clip_train.search.results import Answer, check_output, print_table, write_results
    from clip_train.search.search import Searcher, SearchOptions

    options = typed(SearchOptions, cfg)
    given = cfg.output if isinstance(cfg.output, ListConfig) else [cfg.output]
    outputs = [str(name) for name in given if name is not None]
    for output in outputs:
        check_output(output)
    asked = _asked(cfg)
    folder = EmbeddingFolder.open(str(cfg.embeddings))
    searcher = Searcher(folder, str(cfg.target))
    encoder = _encoder(cfg, folder)
    answers = []
    for name, picture in asked:
        vector = encoder.texts([name])[0] if picture is None else encoder.picture(picture, name)
        answers.append(Answer(name, picture, searcher.search(vector, options)))
    print_table(answers, Console())
    for output in outputs:
        write_results(output, answers)
        print(f"wrote {output}")
    return EXIT_DONE


def _serve(cfg: DictConfig) -> int:
    from clip_train.embedding.folder import EmbeddingFolder
    from clip_train.search.page import PageOptions, SearchPage, make_page_server

    options, folder = typed(PageOptions, cfg), EmbeddingFolder.open(str(cfg.embeddings))
    server = make_page_server(SearchPage(folder, _encoder(cfg, folder), options))
    print(f"http://{options.host}:{server.port} (Ctrl-C ends it)", flush=True)
    server.serve_forever()
    return EXIT_DONE


def _asked(cfg: DictConfig) -> list[tuple[str, bytes | None]]:
    """Texts, or names of pictures with the pictures."""
    from pathlib import Path

    from clip_train.data.picture_files import find_pictures

    if len([key for key in ("text", "image", "batch") if cfg[key] is not None]) != 1:
        raise ConfigError("give exactly one of text=, image= and batch=")
    try:
        if cfg.image is not None:
            return [(str(path), path.read_bytes()) for path in find_pictures(str(cfg.image), "image")]
        lines = (
            [str(cfg.text)] if cfg.batch is None else Path(str(cfg.batch)).expanduser().read_text("utf-8").splitlines()
        )
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"batch={cfg.batch} is no text in UTF-8: {error}") from error
    texts: list[tuple[str, bytes | None]] = [(line.strip(), None) for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{'text' if cfg.batch is None else 'batch'}= has no text in it")
    return texts


def _encoder(cfg: DictConfig, folder: "EmbeddingFolder") -> "QueryEncoder":
    import torch

    from clip_train.search.encoder import QueryEncoder

    model: Any = OmegaConf.to_container(cfg.model, resolve=True) if "model" in cfg else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return QueryEncoder.open(folder, None if cfg.weights is None else str(cfg.weights), model, device)


_COMMANDS = {"index": _index, "query": _query, "serve": _serve}


if __name__ == "__main__":
    main()
