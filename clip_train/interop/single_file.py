"""Weights in one safetensors file, under the model's own names."""

from pathlib import Path

from safetensors.torch import save

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError
from clip_train.interop.reading import read_weights


def export_single_file(weights: str | Path, output: Path) -> int:
    """Put weights, sharded or not, into one file, in the precision they are in.

    Args:
        weights: what `read_weights` takes, such as the folder of a checkpoint.
        output: the file, such as `b32.safetensors`.

    Returns:
        How many weights there are.

    Raises:
        ConfigError: the weights cannot be read, or the output cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in read_weights(str(weights), "weights").tensors.items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, save(tensors))
    except OSError as error:
        raise ConfigError(f"output={output}: {error.strerror}; give a file that can be written") from error
    return len(tensors)
