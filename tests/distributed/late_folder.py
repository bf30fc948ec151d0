"""A run that is started again, whose second rank is shown an older checkpoint first, as by NFS.

`torchrun ... -m tests.distributed.late_folder OUT`
"""

import os
import sys

from clip_train.checkpoints.folder import list_checkpoints, verify
from clip_train.distributed import group_rank
from clip_train.training import run as run_module
from clip_train.training.resume import Checkpoint, Resume, find_checkpoint
from clip_train.training.run_folder import RunFolder
from tests.distributed import train_many

RUN = "run batch_size=32 checkpoint.every=1 checkpoint.keep=9 checkpoint.asynchronous=false data.num_workers=0"


def main(output_dir: str) -> None:
    train_many.main(output_dir, f"{RUN} max_steps=2")
    os.environ["CLIP_TRAIN_RESTARTED"] = "1"
    looks = []

    def find_late(folder: RunFolder, resume: Resume) -> Checkpoint | None:
        looks.append(resume)
        if group_rank() == 0 or len(looks) > 1:
            return find_checkpoint(folder, resume)
        older = list_checkpoints(folder.checkpoints)[-2]
        return Checkpoint(older, verify(older))

    run_module.find_checkpoint = find_late
    train_many.main(output_dir, f"{RUN} max_steps=3 resume=auto")


if __name__ == "__main__":
    main(*sys.argv[1:])
