"""The memory of the interpreter: bytes, and for each byte who wrote and read it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

#: Addresses of allocations are multiples of this, like those of cudaMalloc.
_ALIGNMENT = 256
#: Unmapped bytes behind an allocation, so that an access behind its end is an error.
_GAP = 4096


@dataclass
class Buffer:
    """One allocation, or the shared memory of a block. All arrays have one entry for each byte.

    writer, reader
        thread + 1, counted over the whole grid; 0: no thread, -1 (reader): several threads.
    write_time, read_time
        block number and barrier epoch of the last access, as one number.
    copying
        asynchronous copies to or from the byte that no thread has waited for.
    sectors, requested, touched
        traffic by "ld" and "st": sectors that the requests of warps move, bytes that lanes request, distinct sectors.
    """

    name: str
    base: int
    data: np.ndarray
    written: np.ndarray
    writer: np.ndarray
    write_time: np.ndarray
    reader: np.ndarray
    read_time: np.ndarray
    copying: np.ndarray
    sectors: Counter = field(default_factory=Counter)
    requested: Counter = field(default_factory=Counter)
    touched: dict[str, set[int]] = field(default_factory=lambda: {"ld": set(), "st": set()})

    @classmethod
    def of(cls, name: str, base: int, data: np.ndarray, written: bool) -> Buffer:
        """A buffer of data whose bytes all count as written, or none of them."""
        size = len(data)
        zeros = [np.zeros(size, np.int64) for _ in range(4)]
        return cls(name, base, data, np.full(size, written), *zeros, np.zeros(size, np.int16))


class Memory:
    """Global memory: allocations with unmapped space between them."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._next = 1 << 32

    def add(self, name: str, array: np.ndarray, *, written: bool = True, address: int | None = None) -> int:
        """Maps a contiguous array without a copy, so that the kernel changes it, and returns its address.

        address
            of the first byte, behind all mapped memory; by default a multiple of 256.
        """
        data = array.reshape(-1).view(np.uint8)
        base = self._next if address is None else address
        self.buffers.append(Buffer.of(name, base, data, written))
        self._next = max(self._next, -(-(base + len(data) + _GAP) // _ALIGNMENT) * _ALIGNMENT)
        return base

    def find(self, address: int) -> Buffer | None:
        """The buffer that contains the address."""
        return next((b for b in self.buffers if b.base <= address < b.base + len(b.data)), None)

    def __getitem__(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)
