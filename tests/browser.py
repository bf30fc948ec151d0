"""A real browser, for tests of pages."""

import os
import shutil
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

_SECONDS = 120
_QUIET = ["disable-background-networking", "disable-component-update", "disable-sync", "disable-quic", "no-first-run"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Chrome]:
    """A headless Chromium that asks nobody on its own account."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        reason = "Debian's chromium and chromium-driver are not installed"
        (pytest.fail if os.environ.get("CLIP_TRAIN_REQUIRE_CHROMIUM") else pytest.skip)(reason)
    options = ChromeOptions()
    options.binary_location = str(paths[0])
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1100,900", *_QUIET):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = Chrome(options, ChromeService(str(paths[1])))
    driver.set_page_load_timeout(_SECONDS)
    yield driver
    driver.quit()
