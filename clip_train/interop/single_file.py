"""Weights in one safetensors file, under the model's own names."""

from pathlib import Path

from safetensors.torch import save

from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError
from clip_train.interop.joining import WeightSource, read_source


def export_single_file(source: str | Path | WeightSource, output: Path) -> int:
    """Put weights, sharded or not, into one file, in the precision they are in.

    Args:
        source: such as the folder of a checkpoint.
        output: the file, such as `b32.safetensors`.

    Returns:
        How many weights there are.

    Raises:
        ConfigError: the weights cannot be read, or the output cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in read_source(WeightSource.of(source)).tensors.items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, save(tensors))
    except OSError as error:
        raise ConfigError(f"output={output}: {error.strerror}; give a file that can be written") from error
    return len(tensors)
