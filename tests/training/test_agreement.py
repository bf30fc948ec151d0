from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from clip_train.data.batches import failed
from clip_train.errors import DataError, FaultError
from clip_train.training.callbacks.agreement import RankAgreement
from clip_train.training.callbacks.bad_samples import BadSamples
from clip_train.training.instruments.step_times import StepTimes


@pytest.mark.parametrize(
    ("passing", "samples_seen", "error"),
    [
        (True, 64, FaultError),  # exit code 1: started again, the run may go on
        (True, 0, DataError),  # exit code 2: it never could read them
        (False, 64, DataError),
    ],
)
def test_data_that_cannot_be_read_end_a_run_so_that_it_may_be_started_again(tmp_path, passing, samples_seen, error):
    module: Any = SimpleNamespace(samples_seen=samples_seen, times=StepTimes(torch.device("cpu")))
    saved = []
    agreement = RankAgreement(BadSamples(tmp_path / "bad.csv", 0.1), (), save=lambda *where: saved.append(where))
    batch = failed("shard 3.tar cannot be read any more", passing=passing)
    with pytest.raises(error, match="cannot be read any more") as raised:
        agreement.on_train_batch_start(cast(Any, None), module, batch, 0)
    assert type(raised.value) is error and saved == [(None, module)]
