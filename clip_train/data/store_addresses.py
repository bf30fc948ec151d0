"""Files of Google Cloud Storage and of the Hugging Face Hub, as web servers give them.

The filesystems of these stores could read them as well, but block by block, each with repeats and time-outs of its own,
and without a look at whether the file has changed in between.
"""

from typing import Any
from urllib.parse import quote


def google_address(url: str, fs: Any) -> tuple[str, dict[str, str]]:
    """Where a file of a bucket is on the web, and the headers that show the user's credentials.

    Args:
        url: of scheme `gs`.
        fs: gcsfs's filesystem, which has found the credentials.

    Raises:
        IsADirectoryError: the URL names a bucket only.
    """
    if not fs.split_path(url)[1]:
        raise IsADirectoryError(f"{url} is a folder")
    headers: dict[str, str] = {}
    fs.credentials.apply(headers)
    if payer := fs.requester_pays:
        headers["X-Goog-User-Project"] = payer if isinstance(payer, str) else fs.project
    return fs.url(url), headers


def hub_address(url: str, fs: Any) -> tuple[str, dict[str, str]]:
    """The same for a file on the Hub; `fs.url` would list the file's folder first.

    Args:
        url: of scheme `hf`.
        fs: huggingface_hub's filesystem, which knows the Hub's address and the token.

    Raises:
        IsADirectoryError: the URL names a repository only.
        ValueError: it is malformed.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, parse_hf_uri

    file = parse_hf_uri(url)
    if not file.path_in_repo:
        raise IsADirectoryError(f"{url} is a folder")
    if file.is_bucket:
        address = f"{fs.endpoint}/buckets/{file.id}/resolve/{quote(file.path_in_repo)}"
    else:
        address = hf_hub_url(
            file.id, file.path_in_repo, repo_type=file.type, revision=file.revision, endpoint=fs.endpoint
        )
    return address, build_hf_headers(token=fs.token)
