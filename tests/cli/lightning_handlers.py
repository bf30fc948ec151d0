"""Fit a model, and say whose signal handlers were active meanwhile."""

import signal

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel

from clip_train.training.signals import STOP_SIGNALS, install_handlers, keep_handlers

seen = set()


class Watch(L.Callback):
    """Looks at the handlers at every stage."""

    def look(self, *_, **__) -> None:
        seen.update(signal.getsignal(number) for number in STOP_SIGNALS)

    setup = on_fit_start = on_train_start = on_train_batch_end = on_train_end = teardown = look


install_handlers()
ours = signal.getsignal(signal.SIGTERM)
trainer = L.Trainer(
    accelerator="cpu",
    max_steps=1,
    limit_val_batches=0,
    callbacks=[Watch()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
keep_handlers(trainer)
trainer.fit(BoringModel())
print("ours" if seen == {ours} else seen)
