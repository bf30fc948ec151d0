"""Running out of memory, known for what it is."""

import torch

# Of PyTorch, the system, CUDA, NCCL and cuBLAS, and of oneDNN, which gives no reason: as a rule it is this one.
_ALLOCATION_FAILED = (
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not execute a primitive",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on an accelerator, or in the host's memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILED)
