"""The memory of this machine and of its devices."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax

# With other allocators than these, a GPU program may use more than the limit that its allocator reports.
_LIMITED = ("default", "bfc")


def host_memory() -> int:
    """Return the bytes of this machine's memory, without swap space."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def swap_space() -> int:
    """Return the bytes of this machine's swap space; 0 where that is not known."""
    try:
        found = re.search(r"^SwapTotal: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        return 0
    return 1024 * int(found[1]) if found else 0


def most_memory(devices: Sequence[jax.Device]) -> int | None:
    """Return how many bytes a program can use at most on each of these local devices; None if that is not known.

    CPU devices share the memory and the swap space of their host.
    """
    if devices[0].platform == "cpu":
        return (host_memory() + swap_space()) // len(devices)
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default") not in _LIMITED:
        return None
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return min(limits) or None
