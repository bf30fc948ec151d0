"""Weights, gradients and optimizer state in shards, one per rank, by FSDP2 (Zhao et al., 2023, arXiv:2304.11277)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from clip_train.checkpoints.restore import restore_optimizer
from clip_train.distributed import gathers_rounded, group_size
from clip_train.models import DualEncoder
from clip_train.models.captioner import Captioner
from clip_train.models.hf_text import HFTextTower
from clip_train.models.layers import product_weights, repeated_blocks
from clip_train.models.text_tower import TextTower
from clip_train.training.module import ClipModule


class ShardedStrategy(DDPStrategy):
    """Lightning's DDP strategy, but that the towers are sharded where it would wrap the module.

    Checkpoints are restored as under DDP: weights before sharding, the optimizer's state after it, cut as the weights
    are.

    Args:
        offload: keep the shards, their gradients and the optimizer's state in host memory.
        options: of DDPStrategy.
    """

    _exchanges = True

    def __init__(self, offload: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._offload = offload

    def configure_ddp(self) -> None:
        mesh = init_device_mesh(self.root_device.type, (group_size(),))
        rounded = self.precision_plugin.precision == "bf16-mixed"
        shard_towers(self._encoder, mesh, rounded, self._offload)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backward inside adds up gradients on each rank, and exchanges none."""
        self._set_exchange(False)
        try:
            yield
        finally:
            self._set_exchange(True)

    @property
    def _encoder(self) -> DualEncoder:
        return cast(ClipModule, self.lightning_module).model

    def _set_exchange(self, on: bool) -> None:
        self._exchanges = on
        for shard in _shards(self._encoder):
            shard.set_requires_gradient_sync(on, recurse=False)

    def post_backward(self, closure_loss: Tensor) -> None:
        if self._exchanges:
            average_gradients(self._encoder.parameters())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            restore_optimizer(optimizer, state)


def shard_towers(model: DualEncoder, mesh: DeviceMesh, rounded: bool = False, offload: bool = False) -> None:
    """Shard each block of both towers and of a decoder, and what is left of each; the logit scale and bias stay whole.

    A block's weights are gathered for its forward and again for its backward; a tower's own stay gathered in between.
    All ranks have to call the blocks equally often, so that texts go through in one group.

    Args:
        rounded: the model runs under autocast to bf16. Matrices are rounded before they are gathered, with the same
            result; norms, embeddings and biases are gathered as they are, and gradients averaged in fp32.
        offload: shards and their gradients lie in host memory, where the optimizer's step is taken; on a processor
            they do already.
    """
    pinned = mesh.device_type != "cpu"
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _policy(model) if rounded else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    if isinstance(model.text, TextTower | HFTextTower):
        model.text.one_group = True
    for tower in (model.vision, model.text, *([model.decoder] if isinstance(model, Captioner) else [])):
        for block in repeated_blocks(tower):
            fully_shard(block, **how, reshard_after_forward=True)
        # After backward it is cut again; a frozen one has none.
        fully_shard(tower, **how, reshard_after_forward=not _learns(tower))


def _policy(model: nn.Module) -> MixedPrecisionPolicy:
    if not gathers_rounded():
        return MixedPrecisionPolicy()
    matrices = product_weights(model)
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does
        param_dtype_override_fn=lambda parameter: None if parameter in matrices else parameter.dtype,
    )


def average_gradients(parameters: Iterator[nn.Parameter]) -> None:
    """The mean over ranks of the gradients beside the towers, on every rank; what is sharded has it already."""
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= group_size()


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Weights gathered once, so that ranks may encode different numbers of batches; nothing new if not sharded."""
    shards = _shards(model)
    towers = list(model.children())
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(shard not in towers or not _learns(shard), recurse=False)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
