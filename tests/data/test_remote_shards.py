from pathlib import Path

import pytest

from clip_train.data.augmentation import Augmentation
from clip_train.data.batches import TrainBatches
from clip_train.data.loader import BatchStarts, make_loader
from clip_train.data.order import SampleOrder
from clip_train.data.pairs import PairReader
from clip_train.data.remote_shards import open_shards
from clip_train.data.staging import Stager
from clip_train.data.tokenizer import ClipTokenizer
from tests.data.failing_server import Fault


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_tell_of_downloads_that_were_gone_on_with(server, make_shards, tmp_path, num_workers):
    paths = [Path(shard) for shard in make_shards([5, 5, 5])]
    urls = [server.add(f"/{path.name}", path.read_bytes()) for path in paths]
    for path, faults in zip(paths, (3, 0, 2)):
        server.add(f"/{path.stem}_stats.json", b'{"successes": 5}')
        server.faults[f"/{path.name}"] = [Fault(503)] * faults
    server.add("/other.tar", paths[0].read_bytes())
    server.faults["/other.tar"] = [Fault(503)]
    stager = Stager(tmp_path / "cache", 10**9)
    stager.stage(server.url + "/other.tar")  # the workers are forked from a process that has had its own
    reader = PairReader(open_shards(urls, stager, str(tmp_path)), "png", "txt")
    order = SampleOrder(reader.counts, seed=0, lanes=1)
    batches = TrainBatches(reader, order, Augmentation(), ClipTokenizer(16), 16, batch_size=5, stager=stager)
    loaded = [batch for _, batch in zip(range(6), make_loader(batches, BatchStarts(0, 5), num_workers))]
    assert not any(batch["error"] for batch in loaded)
    assert sum(batch["retries"] for batch in loaded) + stager.take_retries() == 6
    assert num_workers == 0 or sum(batch["retries"] for batch in loaded) == 5
