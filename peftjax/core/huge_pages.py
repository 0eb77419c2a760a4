"""Huge pages for arrays on a CPU, where Linux gives them only to programs that ask for them.

Each step allocates its gradients and activations again, and the kernel maps them page by page: with pages of 4 KiB,
this takes up to a third of a step (benchmarks/huge_pages.py). glibc asks for pages of 2 MiB if the variable
GLIBC_TUNABLES says so, which it reads only when a process starts. Therefore the commands that compute restart
themselves, with the same process id, before they import anything else. A GLIBC_TUNABLES that is set already, also to an
empty text, prevents this.
"""

import contextlib
import os
import sys

from peftjax.core.command import command

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"  # since glibc 2.35; older versions ignore it
_COMPUTE = ("train", "sweep", "evaluate", "generate")
_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


def opt_in(setting: str = _SETTING) -> bool:
    """Whether only programs that ask for huge pages get them, as on Ubuntu. On Debian, all programs do."""
    with contextlib.suppress(OSError), open(setting) as file:  # noqa: PTH123  # pathlib is not loaded yet
        return "[madvise]" in file.read()
    return False


def _start() -> None:
    """Restart this process with huge pages if it runs a command that computes."""
    chosen = VARIABLE in os.environ or "debugpy" in sys.modules  # the debugger would lose the process
    if command() in _COMPUTE and not chosen and sys.executable and opt_in():
        with contextlib.suppress(OSError):  # without huge pages, it computes the same
            os.execve(sys.executable, sys.orig_argv, os.environ | {VARIABLE: VALUE})


_start()
