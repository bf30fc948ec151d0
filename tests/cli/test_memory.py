"""A batch that does not fit into memory, with a limit that is real."""

import re
import sys

import pytest

from tests.cli.runs import TINY, clip_train

# A tiny model takes some 1.1 GiB with all libraries, and 16384 pairs at once more than 2 GiB besides.
LIMITED = ("prlimit", f"--data={2400 << 20}", sys.executable)
BATCH = ("batch_size=8192", "max_steps=1", "data.val.shards=null")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")


def test_the_error_names_the_setting(tmp_path):
    done = clip_train(*TINY, *BATCH, "batch_size=16384", f"output_dir={tmp_path}", launcher=LIMITED)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert (
        "out of memory with micro_batch_size=null (16384 pairs" in line and "try micro_batch_size=8192, or auto" in line
    )


def test_auto_finds_what_fits(tmp_path):
    done = clip_train(*TINY, *BATCH, "micro_batch_size=auto", f"output_dir={tmp_path}", launcher=LIMITED)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"micro_batch_size=auto: (\d+), so (\d+) micro-batch", done.stdout)
    assert found and 1 < int(found[2]) <= 512


def test_auto_takes_all_where_all_fit(tmp_path):
    done = clip_train(
        *TINY, "max_steps=1", "data.val.shards=null", "micro_batch_size=auto", f"output_dir={tmp_path}", "run_name=a"
    )
    assert "micro_batch_size=auto: 32, so 1 micro-batch" in done.stdout, done.stdout + done.stderr
