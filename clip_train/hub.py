"""The Hugging Face hub, where there may be no network."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies


@cache
def heed_network() -> None:
    """To be called before a name is looked up: without a network only the cache is.

    The hub's library would ask it again and again for a minute before it took what the cache has, or failed.
    """
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=10).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True  # what HF_HUB_OFFLINE=1 sets
