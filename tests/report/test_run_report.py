"""The page of a run: what it shows, that it needs nothing from elsewhere, and what it takes for a run."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from clip_train.errors import DataError
from clip_train.report.curves import draw_curves
from clip_train.report.run_report import write_report

SUMMARY = {
    "complete": True,
    "samples_seen": 64000,
    "parameters": 151277313,
    "metrics": {"train/loss": 1.5, "zero_shot/food/top1": 0.625},
    "environment": {"torch": "2.15.0"},
}
METRICS = """\
step,samples_seen,train/loss,train/distillation_loss,val/flickr/loss,val/flickr/image_to_text_recall@1,other
1,32000,3.5,2.5,,,7
2,64000,1.5,2.25,4.5,0.25,7
"""


class Page(HTMLParser):
    """The text of a page, and the addresses that it loads things from."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "<b>run & co"
    evaluation = folder / "evaluations" / "food"
    evaluation.mkdir(parents=True)
    (folder / "config.yaml").write_text("batch_size: 32000\nrun_name: </pre><script>\n")
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    about = {"task": "zeroshot_classification", "dataset": "food101"}
    (evaluation / "results.json").write_text(json.dumps({**about, "metrics": {"acc1": 0.4321}}))
    for path in (folder / "retrieval.png", evaluation / "confusion_matrix.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "results.json").write_text("[]")  # somebody else's
    return folder


def test_it_shows_what_lies_in_the_folder(run):
    page = Page(write_report(run))
    for text in ("<b>run & co", "complete", "64,000", "151,277,313", "zero_shot/food/top1", "0.625", "2.15.0"):
        assert text in page.texts, text
    assert {"Training loss", "Validation loss", "Recall"} < set(page.texts)
    assert {"zeroshot_classification on food101", "acc1", "0.4321", "confusion matrix"} < set(page.texts)
    assert "run_name: </pre><script>" in "\n".join(page.texts)
    pictures = [address for address in page.addresses if not address.startswith("#")]
    assert len(pictures) == 2 and all(address.startswith("data:image/png;base64,") for address in pictures)


def test_a_run_under_way_and_a_folder_that_is_none(run, tmp_path):
    for name in ("summary.json", "metrics.csv", "retrieval.png"):
        (run / name).unlink()
    assert "under way, or cut off" in Page(write_report(run)).texts
    with pytest.raises(DataError, match=r"is not the folder of a run: it has no config\.yaml"):
        write_report(tmp_path)


def test_metrics_of_a_kind_share_a_chart():
    rows = [
        {"samples_seen": str(n), "train/loss": "1", "zero_shot/a/top1": "", "zero_shot/b/top1": "0.5"} for n in (1, 2)
    ]
    columns = ["samples_seen", "train/loss", "zero_shot/a/top1", "zero_shot/b/top1", "train/other"]
    charts = dict(draw_curves(columns, rows))
    assert list(charts) == ["Training loss", "Zero-shot accuracy"]
    assert all(svg.startswith("<svg") and 'width="' not in svg.partition(">")[0] for svg in charts.values())
    both = dict(draw_curves(columns, [{**row, "zero_shot/a/top1": "0.25"} for row in rows]))["Zero-shot accuracy"]
    assert "a/top1" in both and "b/top1" in both


def test_a_long_run_has_no_long_page():
    rows = [{"samples_seen": str(n), "train/loss": str(1 / (n + 1))} for n in range(100_000)]
    ((_, svg),) = draw_curves(["samples_seen", "train/loss"], rows)
    assert len(svg) < 100_000
