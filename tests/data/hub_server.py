"""A Hugging Face Hub on localhost: of its API, what reading a dataset takes."""

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from flask import Flask, Response, redirect, request, send_file
from huggingface_hub import constants
from werkzeug.serving import make_server

from clip_train.data import remote

_REVISION = "0" * 40


@dataclass
class Hub:
    """A server with the dataset `user/set`, whose `files` are given by their paths, and with no other.

    `token` is asked for, if there is one. `requests` are paths asked for, `tokens` what the delivery network was shown.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a server on a free port."""
    hub = Hub()
    server = make_server("127.0.0.1", 0, _app(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        use_hub(hub.url, patch)
        yield hub
    server.shutdown()
    server.server_close()


def use_hub(url: str, patch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does if it is set before huggingface_hub is imported."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)  # other tests may have found no network
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.delenv("HF_TOKEN", raising=False)
    remote._make_filesystem.cache_clear()  # those that know another server


def _app(hub: Hub) -> Flask:
    app = Flask(__name__)

    @app.before_request
    def check() -> Response | None:
        hub.requests.append(request.path)
        if request.path.startswith("/cdn/"):
            hub.tokens.append(request.headers.get("Authorization"))
        elif hub.token and request.headers.get("Authorization") != f"Bearer {hub.token}":
            return _error(401, "RepoNotFound", "Invalid username or password.")
        elif "/user/set" not in request.path:
            return _error(404, "RepoNotFound", "Repository not found")

    @app.get("/api/datasets/user/set")
    def info() -> dict:
        return {"id": "user/set", "sha": _REVISION, "siblings": [{"rfilename": path} for path in hub.files]}

    @app.get("/api/datasets/user/set/tree/main")
    @app.get("/api/datasets/user/set/tree/main/<path:folder>")
    def tree(folder: str = "") -> list[dict] | Response:
        entries = _entries(hub.files, f"{folder}/" if folder else "", request.args["recursive"] == "true")
        return entries or _error(404, "EntryNotFound", "Entry not found")

    @app.get("/datasets/user/set/resolve/main/<path:path>")
    def resolve(path: str) -> Response:
        if path not in hub.files:
            return _error(404, "EntryNotFound", "Entry not found")
        digest = hashlib.sha256(hub.files[path]).hexdigest()
        response = redirect(f"http://localhost:{request.host.rpartition(':')[2]}/cdn/{path}")
        response.headers |= {"X-Linked-ETag": f'"{digest}"', "X-Repo-Commit": _REVISION}
        return response  # type: ignore[return-value]

    @app.get("/cdn/<path:path>")
    def deliver(path: str) -> Response:
        return send_file(io.BytesIO(hub.files[path]), "application/octet-stream", conditional=True)

    return app


def _entries(files: dict[str, bytes], prefix: str, recursive: bool) -> list[dict]:
    """The folder `prefix` as the Hub tells of it."""
    below = [path for path in files if path.startswith(prefix)]
    folders = {path[:end] for path in below for end in range(len(prefix), len(path)) if path[end] == "/"}
    entries = [{"type": "directory", "oid": "1" * 40, "size": 0, "path": path} for path in sorted(folders)]
    entries += [{"type": "file", "oid": "2" * 40, "size": len(files[path]), "path": path} for path in sorted(below)]
    return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]


def _error(status: int, code: str, message: str) -> Response:
    return Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": message})
