"""The memory of this machine, of its devices and of this process."""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

# With other allocators than these, a GPU program may use more than the limit that its allocator reports.
_LIMITED = ("default", "bfc")


def host_memory() -> int:
    """Return the bytes of this machine's memory, without swap space."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def swap_space() -> int:
    """Return the bytes of this machine's swap space; 0 where unknown."""
    return _read_field("meminfo", "SwapTotal", 0)


def most_memory(devices: Sequence[jax.Device]) -> int | None:
    """Return how many bytes a program can use at most on each of these local devices; None if unknown.

    CPU devices share the memory and the swap space of their host.
    """
    if devices[0].platform == "cpu":
        return (host_memory() + swap_space()) // len(devices)
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default") not in _LIMITED:
        return None
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return min(limits) or None


def free_memory(devices: Sequence[jax.Device]) -> int | None:
    """Return how many bytes a program can allocate now on each of these local devices; None if unknown.

    CPU devices share the available memory of their host, or what its control group (a container, or a SLURM job) allows.
    """
    if devices[0].platform == "cpu":
        return min([_read_field("meminfo", "MemAvailable", host_memory()), *_group_limits()]) // len(devices)
    if (most := most_memory(devices)) is None:
        return None
    return min(most, *(most - (device.memory_stats() or {}).get("bytes_in_use", 0) for device in devices))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: on accelerators, the maximum over the local devices.

    On CPU, it is the peak resident set size.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(numbers.get("peak_bytes_in_use", 0) for numbers in stats)
    return peak or _peak_resident()


def _peak_resident() -> int:
    if peak := _read_field("self/status", "VmHWM", 0):  # getrusage would include the parent process's at the fork
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read_field(file: str, name: str, default: int) -> int:
    """The bytes in a field of a file in /proc; `default` if there is none, as on other systems than Linux."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc", file).read_text(), re.MULTILINE)
    except OSError:
        return default
    return 1024 * int(found[1]) if found else default


def _group_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The memory limits of the control groups of this process, in bytes.

    Args:
        groups: The file that lists the groups, "0::/PATH" (version 2) or "N:memory:/PATH" (version 1).
        mounted: Where they are mounted. In a container, its own group is at the top.
    """
    limits = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        top, name = (mounted, "memory.max") if not kinds else (mounted / "memory", "memory.limit_in_bytes")
        here = top / path.strip("/")
        for directory in (here, *here.parents) if not kinds or "memory" in kinds.split(",") else ():
            with contextlib.suppress(OSError, ValueError):  # no such directory, or "max"
                limits.append(int((directory / name).read_text()))
            if directory == top:
                break
    return limits
