"""What the page's server answers when it cannot search: one line that the page shows."""

import io
from typing import Any, cast

import pytest

from clip_train.search.page import PageOptions, SearchPage, make_app
from tests.search.folders import make_folder, unit_vectors


class BrokenEncoder:
    """A model that fails in a way nobody has thought of."""

    def texts(self, texts: list[str]) -> None:
        raise RuntimeError("broken")


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Any:
    folder = make_folder(tmp_path_factory.mktemp("embeddings"), unit_vectors(30, 16))
    options = PageOptions(host="127.0.0.1", port=0, num_results=5, deduplicate=None)
    return make_app(SearchPage(folder, cast(Any, BrokenEncoder()), options)).test_client()


def test_a_fault_is_one_line_for_the_page(client):
    answer = client.post("/search", data={"text": "a shoe"})
    assert answer.status_code == 500
    assert answer.json == {"error": "the search failed: the terminal of clip-search serve says why"}
    assert "broken" not in answer.text


def test_a_picture_too_large_is_one_line_for_the_page(client):
    answer = client.post("/search", data={"image": (io.BytesIO(bytes((1 << 25) + 1)), "large.png")})
    assert answer.status_code == 413
    assert answer.json == {"error": "the picture is larger than 32 MiB: choose a smaller one"}
    assert f'data-largest="{1 << 25}"' in client.get("/").text


def test_other_addresses_answer_as_a_browser_expects(client):
    answer = client.get("/none")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert client.post("/search", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
