"""The LightningModule: one step of contrastive training, and the clock of the run."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from clip_train.data.batches import Batch
from clip_train.data.keyed_random import MODEL_NOISE, keyed_bits
from clip_train.distributed import around_exchanges
from clip_train.models import DualEncoder
from clip_train.models.activation_checkpointing import explained_recomputation
from clip_train.models.cpu_attention import fast_attention
from clip_train.models.locking import fixed_names
from clip_train.models.text_lengths import with_lengths
from clip_train.training.cached_gradients import cached_backward, refuse_batch_norm
from clip_train.training.copied_ahead import SentBatch
from clip_train.training.distillation import Teacher
from clip_train.training.durations import Clock
from clip_train.training.frozen_towers import encoding_once
from clip_train.training.instruments.step_times import (
    BACKWARD,
    COMMUNICATION,
    FORWARD,
    LOSS,
    OPTIMIZER,
    StepTimes,
    when_computed,
)
from clip_train.training.memory import explained_out_of_memory
from clip_train.training.optim.bad_step import clip_or_skip, restore_unless, running_statistics, telling_seed
from clip_train.training.optim.optimizer import build_optimizer, set_rates, with_settings_of
from clip_train.training.optim.schedule import COSINE, make_schedule
from clip_train.training.sorted_texts import sort_texts

Loss = Callable[..., Tensor]


class ClipModule(L.LightningModule):
    """Trains a dual encoder.

    Args:
        model: the towers.
        loss: of this rank's image and text features and the model's `logit_parameters`; the mean over the global batch.
            If it has `metrics`, they are logged with it.
        optim: the `optim` group of the configs.
        clock: batch size and length of the run.
        seed: of the noise inside the model, if it has any.
        micro_batch_size: pairs per rank that go through the towers at once; None for all.
        schedule: the `schedule` group of the configs.
        adapter_only: checkpoints hold only what training changes.
        teacher: that the model learns from beside the loss, if any.

    Raises:
        ConfigError: the optimizer or the schedule refuses its settings.

    Attributes:
        lr: the learning rate of the step, where no tower or layer has its own.
        samples_seen: pairs consumed by finished steps; it decides what comes next.
        skipped_samples: pairs of the stream left out before that, by a roll-back.
        step_metrics: scalars of the last step, on the device.
        times: of the parts of a step; whoever wants them begins them.
    """

    def __init__(
        self,
        model: DualEncoder,
        loss: Loss,
        optim: Mapping,
        clock: Clock,
        seed: int,
        micro_batch_size: int | None = None,
        schedule: Mapping = COSINE,
        adapter_only: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step may have several backward passes
        if micro_batch_size is not None:
            refuse_batch_norm(model)
        self.model = model
        self.loss = loss
        self.teacher = teacher
        self.optim = optim
        self.clock = clock
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.adapter_only = adapter_only
        self.strict_loading = not adapter_only
        self.samples_seen = self.skipped_samples = 0
        self.warmup_samples = clock.samples(optim["warmup"], "optim.warmup")
        self.schedule = make_schedule(schedule, clock, self.warmup_samples)
        self.lr = optim["lr"]
        build_optimizer(model, optim, fused=False)  # what it refuses, it refuses before anything is written
        self.step_metrics: dict[str, Tensor | float] = {}
        self.times = StepTimes(torch.device("cpu"))

    @property
    def position(self) -> int:
        """Where in the sample stream the next step begins."""
        return self.samples_seen + self.skipped_samples

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        statistics = running_statistics(self.model)
        fitting = explained_out_of_memory(self.micro_batch_size, self.clock.batch_size // self.trainer.world_size)
        exchanges = around_exchanges(partial(self.times.part, COMMUNICATION))
        with fast_attention(self.device), fitting, exchanges:
            loss = self._backward(batch)
            self.step_metrics = {"train/loss": loss, "train/logit_scale": self.model.logit_scale.detach().exp()}
            for source in (self.loss, self.teacher):
                self.step_metrics |= getattr(source, "metrics", {})
            optimizer = cast(LightningOptimizer, self.optimizers())
            with self.times.part(OPTIMIZER):
                optimizer.step()  # clips first, or does nothing: `on_before_optimizer_step`
                optimizer.zero_grad()
        restore_unless(torch.as_tensor(self.step_metrics["train/grad_norm"]).isfinite(), statistics)
        self.model.clamp_logit_scale()
        self.step_metrics["train/lr"] = self.lr
        self.samples_seen += self.clock.batch_size
        if self.samples_seen >= self.clock.total_samples:
            self.trainer.should_stop = True

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of the loss, averaged over ranks; returns the loss."""
        inputs = tuple(batch[key] for key in self.model.batch_keys)
        loss_of = self.loss
        if self.teacher is not None:
            with self.times.part(FORWARD):
                loss_of = self.teacher.add_to(self.loss, batch, self.micro_batch_size)
        if self.micro_batch_size is None or self.micro_batch_size >= len(inputs[0]):
            with self.times.part(FORWARD):
                features = self.model(*inputs)
            with self.times.part(LOSS):
                loss = loss_of(*features, **self.model.logit_parameters())
            del features
            self._synchronised_backward(loss, last=True)
            return loss.detach()
        inputs, loss_of = sort_texts(inputs, loss_of)
        with self.times.part(LOSS):  # that is left for what has no part of its own: the loss's gradients, too
            return cached_backward(
                self.times.timed(FORWARD, encoding_once(self.model)),
                loss_of,
                self.model.logit_parameters(),
                inputs,
                micro_batch_size=self.micro_batch_size,
                backward=self._synchronised_backward,
            )

    def _synchronised_backward(self, loss: Tensor, last: bool) -> None:
        """Backward; only the last of a step exchanges gradients."""
        strategy = self.trainer.strategy
        local = strategy.block_backward_sync() if not last and isinstance(strategy, DDPStrategy) else nullcontext()
        if last and self.trainer.world_size > 1:
            when_computed(loss, partial(self.times.enter, COMMUNICATION))
        # Lightning's step is under autocast, which is for forward only.
        uncast = torch.autocast(self.device.type, enabled=False)
        with self.times.part(BACKWARD), local, uncast, explained_recomputation():
            self.manual_backward(loss, gradient=telling_seed(loss))

    def send(self, batch: Batch) -> Batch:
        """The batch on the module's device, or on its way there."""
        start = time.perf_counter()
        moved = super().transfer_batch_to_device(batch, self.device, dataloader_idx=0)
        if "text" in self.model.batch_keys and not batch.get("error"):
            # With their lengths, while they are on the host: the step asks the device for nothing.
            cast(dict[str, Any], moved)["text"] = with_lengths(moved["text"], batch["text"], self.model.text)
        moved["seconds"] = {**batch["seconds"], "transfer": time.perf_counter() - start}
        return moved

    def transfer_batch_to_device(self, batch: Batch | SentBatch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.arrived() if isinstance(batch, SentBatch) else self.send(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The gradient scaler of fp16 hands a fused optimizer unscaled gradients, too late for clipping.
        return build_optimizer(self.model, self.optim, fused=self.trainer.precision != "16-mixed")

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        self.trainer.should_stop |= self.samples_seen >= self.clock.total_samples  # a resumed run may be complete

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout and the like must not depend on what was drawn before, or a resumed run would differ.
        torch.manual_seed(int(keyed_bits(MODEL_NOISE, self.seed, self.samples_seen, self.global_rank, count=1)[0]) >> 1)
        factor = self.schedule(self.samples_seen)
        self.lr = self.optim["lr"] * factor
        for optimizer in self.trainer.optimizers:
            set_rates(optimizer, factor)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_metrics["train/grad_norm"] = clip_or_skip(
            optimizer, self.model.parameters(), self.optim["grad_clip"] or None
        )

    def saved_weights(self) -> dict[str, Tensor]:
        """The weights that checkpoints hold, by name."""
        return self._saved(self.state_dict())

    def _saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        fixed = fixed_names(self) if self.adapter_only else set()
        return {name: weight for name, weight in weights.items() if name not in fixed}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["state_dict"] = self._saved(checkpoint["state_dict"])
        checkpoint["samples_seen"], checkpoint["skipped_samples"] = self.samples_seen, self.skipped_samples

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.samples_seen, self.skipped_samples = checkpoint["samples_seen"], checkpoint["skipped_samples"]
        # A checkpoint brings the settings that it was made with; those of this run count.
        fresh = self.configure_optimizers()
        states = checkpoint["optimizer_states"]
        checkpoint["optimizer_states"] = [with_settings_of(fresh, state, self.model) for state in states]
