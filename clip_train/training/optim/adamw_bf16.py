"""AdamW whose moments are kept in bf16: half the memory of its state."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PART = 1 << 24  # numbers whose moments are in fp32 at once


class BF16AdamW(torch.optim.AdamW):
    """torch's AdamW, in fp32, on moments that are widened for the step, a part of them at a time, and rounded after it.

    They are rounded at random, up or down by how near each is: to the nearest, a second moment with beta 0.999 would
    stay where it is, as its steps are smaller than half of bf16's. The noise follows from the number of the step, so
    that all ranks have the same, and a resumed run goes on as if it had not been interrupted.

    Args:
        params, lr, betas, eps, weight_decay, fused: as of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        steps = 1 + max(group.get("steps", 0) for group in self.param_groups)
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            group["steps"] = steps
            for part in _parts(group["params"]):
                device = part[0].device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(steps))
                self._update(part, group, generator)
        return result

    def _update(self, part: list[nn.Parameter], group: Mapping[str, Any], generator: torch.Generator) -> None:
        states = [self._state_of(parameter, group["fused"]) for parameter in part]
        moments = [_local(state[name]) for name in _MOMENTS for state in states]
        buffer, wide = _widened(moments)
        adamw(
            [_local(parameter) for parameter in part],
            [_local(parameter.grad) for parameter in part if parameter.grad is not None],
            wide[: len(part)],
            wide[len(part) :],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _round_at_random(buffer, generator)
        torch._foreach_copy_(moments, wide)

    def _state_of(self, parameter: nn.Parameter, fused: bool) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Likewise of AdamW with moments in fp32, which are rounded."""
        super().load_state_dict(state_dict)  # in the dtype of the parameters
        for state in self.state.values():
            state |= {name: state[name].to(torch.bfloat16) for name in _MOMENTS if name in state}


def _parts(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those with gradients, in lists of at most `_PART` numbers or of one parameter; of a shard without rows none."""
    part, size = [], 0
    for parameter in parameters:
        if parameter.grad is None or not (numbers := _local(parameter).numel()):
            continue
        if part and size + numbers > _PART:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += numbers
    if part:
        yield part


def _widened(tensors: list[Tensor]) -> tuple[Float[Tensor, " numbers"], list[Tensor]]:
    """Copies in fp32, laid out alike, in one buffer."""
    buffer = torch.empty(sum(tensor.numel() for tensor in tensors), device=tensors[0].device)
    wide, end = [], 0
    for tensor in tensors:
        wide.append(buffer.as_strided(tensor.shape, tensor.stride(), end))
        end += tensor.numel()
    torch._foreach_copy_(wide, tensors)
    return buffer, wide


def _round_at_random(numbers: Float[Tensor, " numbers"], generator: torch.Generator) -> None:
    """To numbers that bf16 has, in place; on average they stay what they are, and those that it has do always."""
    bits = numbers.view(torch.int32)  # of which bf16 has the upper half
    bits += torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    bits &= -(1 << 16)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
