"""A saved state put into an optimizer whose parameters may be sharded otherwise, or not at all."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state dict whose tensors are whole; they are cut as the parameters are.

    Args:
        optimizer: over the same parameters in the same order.
        state: in host memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        number: {name: cut_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})


def cut_like(value: Any, parameter: Tensor) -> Any:
    """What has a sharded parameter's shape, cut as that is and where that is; numbers and step counts as they are."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = value[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
    # `DTensor.from_local` would put an offloaded one into the mesh's device.
    cut = cast(DTensor, torch.empty_like(parameter.detach(), dtype=value.dtype))
    cut.to_local().copy_(local)
    return cut
