"""The page of `clip-search serve`: type a text or drop a picture, see what is found. It needs no network."""

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_train.embedding.folder import EmbeddingFolder
from clip_train.errors import ClipTrainError, ConfigError
from clip_train.search.encoder import QueryEncoder
from clip_train.search.pictures import read_picture, thumbnail
from clip_train.search.results import extra_columns
from clip_train.search.search import Searcher, SearchOptions

_LOCAL = ("127.0.0.1", "localhost")
_LARGEST_UPLOAD = 1 << 25  # bytes
_TOO_LARGE = f"the picture is larger than {_LARGEST_UPLOAD >> 20} MiB: choose a smaller one"
_MOST_RESULTS = 200
_THUMBNAIL = 320  # pixels
_GUARDS = {  # to the browser: nothing from elsewhere, and nothing for pages from elsewhere
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class PageOptions:
    """Where the page is.

    Attributes:
        host: address to listen on; others than this machine's let the network in.
        port: 0 takes a free one.
        num_results: shown at first.
        deduplicate: as of `SearchOptions`.

    Raises:
        ConfigError: a value cannot be used.
    """

    host: str
    port: int
    num_results: int
    deduplicate: float | None

    def __post_init__(self) -> None:
        SearchOptions(self.num_results, None, self.deduplicate)


class SearchPage:
    """What the page asks for. One search at a time, as the model and DuckDB want it.

    Raises:
        DataError: the folder has no samples, or no index and too many to do without.
    """

    def __init__(self, folder: EmbeddingFolder, encoder: QueryEncoder, options: PageOptions) -> None:
        self.folder, self.options = folder, options
        self._encoder, self._lock = encoder, threading.Lock()
        self._searchers = {side: Searcher(folder, side) for side in folder.embeddings}
        for searcher in self._searchers.values():
            searcher.check_ready()

    def find(self, form: Any, picture: bytes) -> dict[str, Any]:
        """The hits of a form, as the page shows them. Raises ClipTrainError if they cannot be found."""
        begin = time.monotonic()
        with self._lock:
            vector = self._vector(form.get("text", "").strip(), picture)
            searcher = self._searchers.get(form.get("target", "image"))
            if searcher is None:
                raise ConfigError(f"there are {' and '.join(self._searchers)} only")
            wanted = form.get("num_results", type=int, default=self.options.num_results)
            where = form.get("where", "").strip() or None
            options = SearchOptions(min(wanted, _MOST_RESULTS), where, self.options.deduplicate)
            hits = searcher.search(vector, options)
        shown = [
            {
                "number": hit.number,
                "score": hit.score,
                "key": str(hit.row.get("key") or hit.row.get("image_path") or ""),
                "caption": str(hit.row.get("caption") or ""),
                "fields": [f"{name} {value}" for name, value in extra_columns(hit.row).items() if value is not None],
            }
            for hit in hits
        ]
        return {"hits": shown, "milliseconds": 1000 * (time.monotonic() - begin)}

    def _vector(self, text: str, picture: bytes) -> np.ndarray:
        if picture:
            return self._encoder.picture(picture, "the file")
        if not text:
            raise ConfigError("type a text or choose a picture")
        return self._encoder.texts([text])[0]

    def picture(self, number: int) -> bytes | None:
        """A sample's picture, small."""
        if not 0 <= number < len(self.folder):
            return None
        with self._lock:
            row = self.folder.rows([number])[0]
        return thumbnail(read_picture(row), _THUMBNAIL)


def make_app(page: SearchPage) -> Any:
    """The Flask application. Raises ConfigError if Flask is not installed."""
    try:
        import flask
    except ImportError as error:
        raise ConfigError("the page needs an extra: pip install '.[search]' in the checkout") from error
    from werkzeug.exceptions import HTTPException

    app = flask.Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = _LARGEST_UPLOAD
    if page.options.host in _LOCAL:
        app.config["TRUSTED_HOSTS"] = list(_LOCAL)  # a site elsewhere must not get here under a name of its own

    @app.before_request
    def refuse_other_sites() -> None:
        site = flask.request.headers.get("Sec-Fetch-Site", "none")
        if flask.request.path != "/" and site not in ("same-origin", "none"):
            flask.abort(403)

    @app.get("/")
    def show() -> str:
        columns = extra_columns(page.folder.rows([0])[0])
        example = f'"{next(iter(columns))}" = ...' if columns else "caption like '%dog%'"
        sides, count = list(page.folder.embeddings), f"{len(page.folder):,}"
        about = {"count": count, "sides": sides, "example": example, "num_results": page.options.num_results}
        about |= {"largest": _LARGEST_UPLOAD, "too_large": _TOO_LARGE}
        return flask.render_template("page.html", **about)

    @app.post("/search")
    def search() -> dict[str, Any]:
        upload = flask.request.files.get("image")
        try:
            return page.find(flask.request.form, upload.read() if upload else b"")
        except ClipTrainError as error:
            return {"error": str(error)}

    @app.get("/picture/<int:number>")
    def picture(number: int) -> Any:
        found = page.picture(number)
        return flask.Response(found, mimetype="image/jpeg") if found else flask.abort(404)

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> Any:
        if flask.request.path != "/search":
            return error
        reasons = {413: _TOO_LARGE, 500: "the search failed: the terminal of clip-search serve says why"}
        return {"error": reasons.get(error.code or 500, error.description)}, error.code or 500

    @app.after_request
    def guard(response: Any) -> Any:
        response.headers.update(_GUARDS)
        return response

    return app


def make_page_server(page: SearchPage) -> Any:
    """A server that listens already; `serve_forever` answers. Raises ConfigError if the address cannot be had."""
    import socket

    app, options = make_app(page), page.options
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *_: Any) -> None:
            pass

    try:
        listening = socket.create_server((options.host, options.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"host={options.host} port={options.port} cannot be listened on: {reason}") from error
    with listening:
        port = listening.getsockname()[1]
        return make_server(options.host, port, app, threaded=True, request_handler=Quiet, fd=listening.detach())
