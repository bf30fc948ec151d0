"""The weights of a checkpoint in one safetensors file, under the model's own names."""

from pathlib import Path

from safetensors.torch import save

from clip_train.checkpoints.folder import InvalidCheckpointError, read_weights, verify
from clip_train.data.files import write_atomic
from clip_train.errors import ConfigError


def export_single_file(checkpoint: Path, output: Path) -> int:
    """Put the weights of a checkpoint, sharded or not, into one file.

    Args:
        checkpoint: the folder.
        output: the file, such as `b32.safetensors`.

    Returns:
        How many weights there are.

    Raises:
        ConfigError: the checkpoint is not valid, or the output cannot be written.
    """
    try:
        verify(checkpoint)
        weights = {name.removeprefix("model."): weight for name, weight in read_weights(checkpoint).items()}
    except (InvalidCheckpointError, OSError, ValueError) as error:
        raise ConfigError(f"weights={checkpoint}: {error}; give the folder of a checkpoint") from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, save(weights))
    except OSError as error:
        raise ConfigError(f"output={output}: {error.strerror}; give a file that can be written") from error
    return len(weights)
