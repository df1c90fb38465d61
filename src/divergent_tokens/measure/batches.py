"""Sequences grouped so that they fit the device: right-padded, halved when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

FIRST_TRY_CPU = 16
FIRST_TRY_GPU = 128
SHARE_OF_MEMORY = 0.25
"""Of an accelerator's free memory, for each thing that is kept for later there."""


@dataclass
class BatchSize:
    """How many sequences go through at once; lowered for good when the memory does not suffice."""

    value: int


def first_batch_size(device: torch.device) -> BatchSize:
    """Where trying starts when nobody named a size."""
    return BatchSize(FIRST_TRY_CPU if device.type == "cpu" else FIRST_TRY_GPU)


def in_batches(items: Sequence[int], size: BatchSize) -> list[Sequence[int]]:
    """The items in batches of the size; the last one may be smaller."""
    return [items[start : start + size.value] for start in range(0, len(items), size.value)]


def run_batches(
    items: Sequence[int], size: BatchSize, run: Callable[[Sequence[int]], T]
) -> Iterator[tuple[Sequence[int], T]]:
    """Each batch of items with what `run` made of it; a batch that does not fit is tried in halves.

    Raises what the allocator raised when a single sequence does not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size.value]
        try:
            result = run(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error) or len(batch) == 1:
                raise
            result = None
        if result is None:  # outside the handler: there the traceback would keep the tensors alive
            size.value = max(1, len(batch) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield batch, result
        start += len(batch)


def _out_of_memory(error: BaseException) -> bool:
    # The CPU allocator of torch, cuBLAS and MPS raise a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error)
        for sign in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    )


def free_bytes(device: torch.device) -> int:
    """What a CUDA device has left, the allocator's own reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Ids [row, token], short rows filled with zeros on the right."""
    ids: NDArray[np.int64] = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return torch.from_numpy(ids).to(device)
