"""The gradient of a large batch in the memory of a small one (Gao et al., 2021, arXiv:2101.06983).

The towers encode every micro-batch but the last without keeping activations; the loss is taken once, on all features;
backward goes on from the features' gradients, through the last micro-batch as it stands and through each of the others
after it is encoded again, with the same random numbers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clip_train.errors import ConfigError
from clip_train.training.optim.bad_step import telling_seed

Encode = Callable[..., tuple[Tensor, ...]]


def cached_backward(
    encode: Encode,
    loss: Callable[..., Tensor],
    logit_parameters: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    *,
    micro_batch_size: int,
    backward: Callable[[Tensor, bool], None],
) -> Float[Tensor, ""]:
    """Backward of `loss(*encode(*inputs), **logit_parameters)`, with activations of one micro-batch at a time.

    The gradients are those of the loss itself, to rounding; with dropout, those of the masks drawn by micro-batch.
    Of k micro-batches, k - 1 are encoded twice.

    Args:
        encode: inputs to features: tensors with this rank's pairs along the first axis. Those that need no gradient
            go to the loss, and that is all.
        loss: of the features, and the `logit_parameters` by name; called once.
        logit_parameters: what the loss needs besides features, such as the temperature.
        inputs: tensors with this rank's pairs along the first axis.
        micro_batch_size: pairs at a time; the last micro-batch may be smaller.
        backward: called with a scalar for each micro-batch, and whether it is the last one: until then gradients
            accumulate, and only the last call may synchronise them over ranks.

    Returns:
        The loss, detached.
    """
    parts = [slice(start, start + micro_batch_size) for start in range(0, len(inputs[0]), micro_batch_size)]
    device = inputs[0].device
    noise, features = [], []
    with torch.no_grad():
        for part in parts[:-1]:
            noise.append(_random_state(device))
            features.append(encode(*(tensor[part] for tensor in inputs)))
    encoded = encode(*(tensor[parts[-1]] for tensor in inputs))
    noise_after = _random_state(device)
    leaves = [
        torch.cat(parts_of_one).detach().requires_grad_(last.requires_grad)
        for last, parts_of_one in zip(encoded, zip(*features, encoded, strict=True), strict=True)
    ]
    del features
    scalars = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in logit_parameters.items()}
    value, gradients = _loss_and_gradients(loss, leaves, scalars)
    feature_grads, scalar_grads = gradients[: len(leaves)], gradients[len(leaves) :]
    del leaves
    for number in reversed(range(len(parts))):  # the last micro-batch first: its activations are there
        part = parts[number]
        if encoded is None:
            _set_random_state(noise[number], device)
            encoded = encode(*(tensor[part] for tensor in inputs))
        surrogate = _weighted_sum(encoded, feature_grads, part)
        encoded = None
        if number == 0:  # every parameter must take part in the one synchronised backward
            pairs = zip(logit_parameters.values(), scalar_grads, strict=True)
            surrogate = surrogate + sum(parameter * grad for parameter, grad in pairs if grad is not None)
        backward(surrogate, number == 0)
        del surrogate
    _set_random_state(noise_after, device)
    return value


def _weighted_sum(encoded: tuple[Tensor, ...], grads: Sequence[Tensor | None], part: slice) -> Tensor:
    """What has the features' gradients as its own."""
    return torch.stack(
        [(x * grad[part]).sum() for x, grad in zip(encoded, grads, strict=True) if grad is not None]
    ).sum()


def _loss_and_gradients(
    loss: Callable[..., Tensor], leaves: list[Tensor], scalars: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, detached, and its gradients, None where none is needed: nothing that it kept outlives this."""
    value = loss(*leaves, **scalars)
    inputs = [x for x in (*leaves, *scalars.values()) if x.requires_grad]
    with torch.autocast(value.device.type, enabled=False):  # which is for forward only
        grads = torch.autograd.grad(value, inputs, telling_seed(value), allow_unused=True)
    found = iter(torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True))
    return value.detach(), [next(found) if x.requires_grad else None for x in (*leaves, *scalars.values())]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def refuse_batch_norm(model: nn.Module) -> None:
    """Raises ConfigError if a tower normalises by the batch: its statistics would be those of the micro-batch.

    One that is held still (`models/locking.py`) does not.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f"micro_batch_size: {name} is a batch norm, whose statistics would be those of a micro-batch:"
                " leave micro_batch_size=null or choose a model with layer norm"
            )
