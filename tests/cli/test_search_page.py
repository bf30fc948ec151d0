"""The page of clip-search serve, in a real browser."""

import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from clip_train.data.demo import unpack_demo
from tests.browser import browser as browser
from tests.cli.embeddings import embed_shard

_SECONDS = 120


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    """Embeddings of 194 of the built-in emoji, and the file of one of them, under its key."""
    folder = tmp_path_factory.mktemp("emoji")
    (shard,) = Path(unpack_demo("demo:emoji/val_concept")).glob("*.tar")
    with tarfile.open(shard) as tar:
        member = [member for member in tar.getmembers() if member.name.endswith(".webp")][3]
        picture = tar.extractfile(member)
        assert picture
        (folder / member.name).write_bytes(picture.read())
    embed_shard(folder, shard, "metadata=[group]")
    return folder


@pytest.fixture(scope="module")
def url(browser, emoji):
    """Of `clip-search serve`, which ends when it is interrupted."""
    command = [sys.executable, "-m", "clip_train.commands.search", "serve", f"embeddings={emoji}/embeddings", "port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background have it ignored
    )
    assert process.stdout
    too_long = threading.Timer(_SECONDS, process.kill)
    too_long.start()
    address = process.stdout.readline().split(" ")[0]
    too_long.cancel()
    assert address.startswith("http://127.0.0.1:"), process.communicate()
    yield address
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=_SECONDS)
    assert process.returncode == 0


def shown(browser) -> list[str]:
    """The texts of the results, once there are any and their pictures are there."""
    WebDriverWait(browser, _SECONDS).until(lambda _: "found in" in browser.find_element(By.ID, "status").text)
    loaded = "return [...document.querySelectorAll('#results img')].every(i => i.complete && i.naturalWidth > 0)"
    WebDriverWait(browser, _SECONDS).until(lambda _: browser.execute_script(loaded))
    return [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#results li")]


def status(browser) -> str:
    """The message, once there is one."""
    WebDriverWait(browser, _SECONDS).until(lambda _: browser.find_element(By.ID, "status").text not in ("", "…"))
    return browser.find_element(By.ID, "status").text


def test_a_typed_text_and_a_dropped_picture_find_samples(browser, url, emoji):
    browser.get(url)
    assert "194 samples" in browser.find_element(By.TAG_NAME, "header").text
    browser.find_element(By.ID, "text").send_keys("a red heart\n")
    assert len(shown(browser)) == 20

    (picture,) = emoji.glob("*.webp")
    browser.get(url)
    browser.find_element(By.ID, "image").send_keys(str(picture))
    assert picture.stem in shown(browser)[0]

    browser.get(url)
    first = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        fetch('/picture/5').then(answer => answer.blob()).then(blob => {
          const files = new DataTransfer();
          files.items.add(new File([blob], 'dropped.jpg', {type: 'image/jpeg'}));
          document.dispatchEvent(new DragEvent('drop', {dataTransfer: files, cancelable: true}));
          done(blob.size);
        });
        """
    )
    assert first > 0
    assert len(shown(browser)) == 20
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(asked) > 20
    assert all(address.startswith((url, "blob:")) for address in asked)


def test_conditions_targets_and_errors(browser, url):
    browser.get(url)
    where = browser.find_element(By.NAME, "where")
    where.send_keys("\"group\" = 'symbols'")
    Select(browser.find_element(By.NAME, "target")).select_by_value("text")
    browser.find_element(By.ID, "text").send_keys("a sign\n")
    assert all("group symbols" in text for text in shown(browser))

    browser.get(url)
    browser.find_element(By.NAME, "where").send_keys("grop = 1")
    browser.find_element(By.ID, "text").send_keys("x\n")
    assert status(browser).startswith('where=grop = 1: Binder Error: Referenced column "grop" not found')
    assert browser.find_element(By.ID, "status").get_attribute("class") == "error"
    browser.get(url)
    browser.find_element(By.CSS_SELECTOR, "button").click()
    assert status(browser) == "type a text or choose a picture"


def test_a_page_under_another_name_is_refused(url):
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(url, headers={"Host": "elsewhere.example"}), timeout=_SECONDS)
    with urlopen(url, timeout=_SECONDS) as answer:
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
