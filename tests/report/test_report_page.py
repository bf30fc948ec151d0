"""The page of a run in a real browser: on a screen and on a phone, with nothing from elsewhere."""

import pytest

from clip_train.report.run_report import write_report
from tests.browser import browser as browser
from tests.report.test_run_report import run as run


@pytest.mark.parametrize(("width", "mobile"), [(1100, False), (390, True)])
def test_the_page_fits_and_asks_for_nothing(browser, run, width, mobile):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(write_report(run).as_uri())
    assert browser.title.startswith("<b>run & co")
    assert browser.execute_script("return innerWidth") == width  # that of the page, not of a screen it was made for
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in asked if not address.startswith("data:")] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
