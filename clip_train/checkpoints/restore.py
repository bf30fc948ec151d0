"""A saved state put into a model and an optimizer that may be sharded otherwise, or not at all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@torch.no_grad()
def restore_model(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights into a model; of a parameter sharded by FSDP2 each rank takes its part.

    Args:
        model: with the same weights by name.
        weights: in host memory.

    Raises:
        KeyError: one is missing.
    """
    for name, own in model.state_dict().items():
        (own.to_local() if isinstance(own, DTensor) else own).copy_(_local_part(weights[name], own))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state dict whose tensors are whole; they are cut as the parameters are.

    Args:
        optimizer: over the same parameters in the same order.
        state: in host memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        number: {name: _like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})


def _like(value: Any, parameter: Tensor) -> Any:
    """A moment of a sharded parameter, cut as it is; numbers and step counts as they are."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    local = _local_part(value, parameter).to(parameter.device)
    return DTensor.from_local(
        local.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _local_part(whole: Tensor, target: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
