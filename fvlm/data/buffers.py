"""Memory for packs that trainer and workers share and use again and again."""

from __future__ import annotations

import logging
import mmap
import weakref
from contextlib import suppress

import numpy as np
import torch

logger = logging.getLogger(__name__)


class BufferPool:
    """Buffers of one size, mapped before the workers are forked, so that both sides see the same bytes.

    A pack is tens of megabytes: fresh memory for each would cost the system's zeroing and mapping of every page, and
    handing it over a copy. A buffer is lent as a tensor and comes back by itself when nothing looks into it any more.
    """

    def __init__(self, num_buffers: int, nbytes: int):
        """Memory is taken when a buffer is first written."""
        self._arrays = [np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes] for _ in range(num_buffers)]
        self._free = list(range(num_buffers))
        self._registered: list[int] = []

    def take(self) -> int | None:
        """A buffer that nobody uses, to be filled and then lent; None where there is none."""
        return self._free.pop() if self._free else None

    def view(self, number: int) -> torch.Tensor:
        """uint8 [nbytes], for who fills it."""
        return torch.from_numpy(self._arrays[number])

    def lend(self, buffer: int | torch.Tensor) -> torch.Tensor:
        """uint8 [nbytes], for who reads it: the buffer is free again once this tensor and all its views are gone.

        A tensor, which is not of the pool, is given back as it is.
        """
        if isinstance(buffer, torch.Tensor):
            return buffer
        array = self._arrays[buffer][:]  # an object of its own: the tensor's memory holds it, and it alone
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return torch.from_numpy(array)

    def pin(self) -> None:
        """Make the buffers page-locked for CUDA, so that copies from them run beside everything else."""
        for array in self._arrays:
            failure = int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0))
            if failure:
                logger.warning(
                    "CUDA cannot page-lock %d bytes (error %d): packs are copied once more on their way to the device; "
                    "see ulimit -l",
                    array.nbytes,
                    failure,
                )
                with suppress(RuntimeError):  # it stays CUDA's last error, and the next launch would be blamed for it
                    torch.zeros(1, device="cuda")
                return
            self._registered.append(array.ctypes.data)

    def unpin(self) -> None:
        """Undo `pin`; no copy may be under way."""
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop())
