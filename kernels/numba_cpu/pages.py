"""Large pages for the memory of results, so that the kernels' first writes to it cost few page faults.

Memory that an allocator has just got from the operating system has no pages yet: the first write to each 4 kB traps
into the kernel, which on a virtual machine can take longer than the products of short lines that are written there.
Linux maps 2 MB at a time where a program asks for it, as NumPy does for its own large arrays.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


@functools.cache
def _advise() -> tuple[int, Callable[[int, int, int], int] | None]:
    """Return the size of a large page in bytes and the C library's madvise; None where there are no such pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0, None
    try:
        size = int(_SIZE.read_text())
        madvise = ctypes.CDLL(None).madvise
    except (OSError, ValueError, AttributeError):  # a kernel without them, or a C library without the function
        return 0, None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    madvise.restype = ctypes.c_int
    return size, madvise


def may_have_large_pages(size: int) -> bool:
    """Tell whether memory of this many bytes can have a large page."""
    large, madvise = _advise()
    return madvise is not None and size >= large


def prefer_large_pages(address: int, size: int) -> None:
    """Ask for large pages under the memory at an address, if some fit into its `size` bytes.

    What the memory holds stays. The advice is about whole pages, so the first and the last page are included: they may
    hold other data of this process, for which it is as good. A refusal, where the system is set to give no large pages,
    changes nothing.
    """
    large, madvise = _advise()
    if madvise is None or size < large:
        return
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    end = -(-(address + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    if -(-start // large) * large + large <= end:
        madvise(start, end - start, mmap.MADV_HUGEPAGE)
