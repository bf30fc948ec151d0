"""The terminal, and what programs log to it."""

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler


def log_to_terminal(first_rank: bool = True) -> Console:
    """Show what clip_train logs, of other ranks than the first only warnings; returns what bars are drawn on."""
    console = Console()
    if console.is_terminal:  # print above the progress bar
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%X"))
    logger = logging.getLogger("clip_train")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if first_rank else logging.WARNING)
    logger.propagate = False
    return console
