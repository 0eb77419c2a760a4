"""What must be set before jax is imported, here and in the processes that tests start; and the shared fixtures."""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

assert "jax" not in sys.modules, "a pytest plugin imported jax before these settings"
# without bytecode on disk, each process that tests start would compile thousands of modules again, for 6 s
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["JAX_PLATFORMS"] = "cpu"
# 8 devices, and little optimization: the programs run once, on tiny shapes, and compiling them is most of the work.
# Processes that tests start (tests/runs.py) compile as users do only where a test says so.
XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# jax 0.10 still has XLA's older code generator for fusions, which compiles in half the time. Users run the newer one: so do
# the tests on newer versions of jax, to which this flag is unknown and therefore fatal.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(XLA_FLAGS)
# torch's threads spin while they wait: several of them beside another test process take 30 times as long as one
os.environ["OMP_NUM_THREADS"] = "1"
# (3,) + (2, 3) broadcasts silently elsewhere; here it is an error, because it is how shapes go wrong unseen
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# compiled programs outlive the process: the second run of the tests does not compile
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ.get("PEFTJAX_TEST_CACHE", str(ROOT / ".cache" / "jax")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Tracing makes many objects, few of which are garbage: looking for it less often saves a twentieth of the time.
gc.set_threshold(50_000, 50, 100)

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tests/interop imports torch, which is not part of the test extra; where it is missing, `make test-interop` finds no
# test and fails
collect_ignore = [] if importlib.util.find_spec("torch") else ["interop"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[str] = set()  # tests marked slow_cases whose first case was collected
    for item in items:
        if ROOT / "tests" / "interop" in item.path.parents:
            item.add_marker("interop")
        if item.get_closest_marker("slow_cases") and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker("slow")
            seen.add(test)
    contract = [index for index, item in enumerate(items) if item.path.name == "test_contract.py"]
    # Method by method: what one test compiles for a method, the next one uses in the same process.
    for index, item in zip(contract, sorted((items[i] for i in contract), key=case), strict=True):
        items[index] = item


def case(item: pytest.Item) -> str:
    """The method that a test of the contract is about."""
    return (
        str(item.callspec.params.get("name", ""))
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else ""
    )


MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """Drop the compiled programs once this process takes a quarter of the memory; the disk cache still has them.

    glibc keeps what is freed unless it is told to return it. Without that, every later test would drop its programs again.
    """
    yield
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MEMORY / 4:
        sys.modules["jax"].clear_caches()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with real checkpoints and data: $PEFTJAX_ASSETS, or shared/assets beside the repository."""
    folder = Path(os.environ.get("PEFTJAX_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no real checkpoints at {folder}; set PEFTJAX_ASSETS")
    return folder
