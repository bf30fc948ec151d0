"""A step whose loss or gradient is not finite, on whichever rank, changes nothing on any of them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def telling_seed(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What backward begins with: 1, or NaN if the loss is not finite.

    So a loss that is not finite makes every gradient NaN, and the exchange of gradients carries that to all ranks: the
    norm of the synchronised gradient alone says, everywhere the same, whether the step can be used.
    """
    return 1 + 0 * loss.detach()


def clip_or_skip(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], limit: float | None
) -> Float[Tensor, ""]:
    """Clip the synchronised gradient; if its norm is not finite, make the optimizer's next step do nothing.

    The device decides for a fused optimizer: it reads `found_inf`, as the gradient scaler of fp16 leaves it, and the
    host does not wait, unless gradients are offloaded to it. For any other the host reads the norm (`make_skippable`).

    Args:
        limit: the largest norm; None only measures it.

    Returns:
        The norm before clipping.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = _norm(grads)
    if limit is not None:
        _clip(grads, limit, norm)
    if optimizer.defaults.get("fused"):
        found = (~norm.isfinite()).float()
        # The optimizer would copy it to gradients in host memory without waiting, and read it before it is there.
        on_host = any(grad.device.type == "cpu" for grad in grads)
        offloaded = on_host and found.device.type != "cpu"
        optimizer.found_inf = found.cpu() if offloaded else found  # pyright: ignore[reportAttributeAccessIssue]
    else:
        optimizer.skips_step = not norm.isfinite()  # pyright: ignore[reportAttributeAccessIssue]
    return norm


def make_skippable(optimizer: torch.optim.Optimizer) -> None:
    """Let `clip_or_skip`, called in the step's closure or before the step, make it do nothing.

    Steps without gradients would not do: LAMB counts them.
    """
    step = optimizer.step

    def step_or_skip(closure: Callable[[], Any] | None = None) -> Any:
        result = None if closure is None else closure()
        if not getattr(optimizer, "skips_step", False):
            step()
        return result

    optimizer.step = step_or_skip


def _norm(grads: list[Tensor]) -> Float[Tensor, ""]:
    """Of all of them together; some may be sharded, in host memory even, and others, such as the logit scale's, not."""
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    whole = nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
    if not sharded:
        return whole
    mesh = sharded[0].device_mesh
    square = nn.utils.get_total_norm([grad.to_local() for grad in sharded]).to(mesh.device_type).square()
    dist.all_reduce(square, group=mesh.get_group())
    return (square + whole.to(square.device).square()).sqrt()


@torch.no_grad()
def _clip(grads: list[Tensor], limit: float, norm: Float[Tensor, ""]) -> None:
    """As `nn.utils.clip_grads_with_norm_`, which sends what is sharded through DTensor's dispatch, in Python."""
    coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        alike.setdefault((local.device, local.dtype), []).append(local)
    for (device, _), group in alike.items():
        torch._foreach_mul_(group, coefficient.to(device))


def running_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What a forward pass changes, the statistics of batch norms, each with a copy of it."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]


def restore_unless(finite: Tensor, statistics: list[tuple[Tensor, Tensor]]) -> None:
    """Put back what `running_statistics` copied, unless `finite`; the device decides."""
    for buffer, before in statistics:
        buffer.copy_(torch.where(finite, buffer, before))
