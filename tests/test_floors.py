"""The floors of the house: a module imports from the floors below it, and a light `import peftjax` stays light."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "peftjax"

# From the ground up. A room imports only from the floors below its own.
FLOORS = [
    ["core"],
    ["quant", "trackers", "sampling"],
    ["log"],
    ["sharding"],
    ["nn", "totals"],
    ["losses"],
    ["models"],
    ["adapters"],
    ["methods", "decoding"],
    ["io"],
    ["data"],
    ["tasks"],
    ["report"],
    ["training"],
    ["plan", "train", "evaluate", "generate", "sweep", "compare", "list_methods"],  # the commands
    ["trainer", "generation"],  # the public functions that are more than a part of the library
    ["__init__"],  # the public names
    ["__main__"],  # the command `peftjax`
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = [
    "tensorflow_datasets", "grain", "orbax", "matplotlib", "tensorboardX", "pyarrow", "torch", "tensorflow", "sklearn",
    "sacrebleu", "PIL", "transformers", "wandb", "mlflow", "trackio",
]  # fmt: skip


def imported_rooms(source: str, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of peftjax, anywhere in the source of `module` (the parts below peftjax, without
    a final __init__ only its package is meant: ("nn", "__init__") is peftjax/nn/__init__.py)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = ("peftjax", *module)[: -node.level] + base
            # `from peftjax import sharding` imports a room, `from peftjax.nn import linear` one of its modules
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "peftjax":
                room = name[1] if len(name) > 1 else "__init__"
                known = room in FLOOR_OF or (PACKAGE / room).exists() or (PACKAGE / f"{room}.py").exists()
                yield node.lineno, room if known else "__init__"


def violations(source: str, path: str) -> list[str]:
    """Every import in the file at `path` (below peftjax) that does not go downward."""
    module = tuple(path.removesuffix(".py").split("/"))
    here = module[0]
    if here not in FLOOR_OF:
        return [f"{path}: {here} has no floor; give it one in tests/test_floors.py"]
    found = []
    for line, room in imported_rooms(source, module):
        if room not in FLOOR_OF:
            found.append(f"{path}:{line}: {room} has no floor; give it one in tests/test_floors.py")
        elif room != here and FLOOR_OF[room] >= FLOOR_OF[here]:
            found.append(f"{path}:{line}: {here} (floor {FLOOR_OF[here]}) imports {room} (floor {FLOOR_OF[room]})")
    return found


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_go_downward_only() -> None:
    files = python_files()
    assert files
    found = [line for path in files for line in violations(path.read_text(), path.relative_to(PACKAGE).as_posix())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "offender"),
    [
        ("core/paths.py", "from peftjax.nn.linear import Linear", "nn"),
        ("nn/linear.py", "def f():\n    import peftjax.methods.lora", "methods"),
        ("models/llama.py", "from peftjax.methods import attach", "methods"),
        ("adapters/attach.py", "from peftjax.methods import Lora", "methods"),
        ("io/load.py", "from ..data import chat", "data"),
        ("data/batches.py", "from .. import tasks", "tasks"),
        ("training/optim.py", "from peftjax import train", "train"),
        ("sweep.py", "from .train import main", "train"),
        ("adapters/attach.py", "import peftjax", "__init__"),
        ("nn/stack.py", "from peftjax import Lora", "__init__"),
        ("helpers.py", "", "helpers"),
    ],
)
def test_the_checker_catches_an_import_that_does_not_go_downward(path: str, source: str, offender: str) -> None:
    (message,) = violations(source, path)
    assert offender in message


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/config.py", "from peftjax.core.errors import UserError"),
        ("core/config.py", "from .errors import UserError\nfrom . import paths"),
        ("nn/linear.py", "from peftjax import sharding"),
        ("models/llama.py", "from ..nn.linear import Linear\nimport jax"),
        ("train.py", "from peftjax import losses\nfrom peftjax.io import load"),
        ("__init__.py", "from peftjax.io.load import load_model\nfrom .methods import Lora"),
    ],
)
def test_the_checker_lets_downward_imports_pass(path: str, source: str) -> None:
    assert violations(source, path) == []


def imported_files(file: Path) -> set[Path]:
    """The files of peftjax that a file imports."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {file_of(name) for name in names if name.partition(".")[0] == "peftjax"}


def file_of(name: str) -> Path:
    """The file of the module `name`, or of the module that defines `name`."""
    parts = name.split(".")[1:]
    places = [PACKAGE.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    candidates = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return next(file for file in candidates if file.is_file())


def test_no_module_imports_itself_through_others() -> None:
    graph = {file: imported_files(file) for file in python_files()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    assert PACKAGE / "core" / "errors.py" in graph[PACKAGE / "core" / "cli.py"]


def test_no_module_is_called_utils() -> None:
    assert not [path for path in python_files() if path.stem in ("util", "utils", "misc", "helpers")]


def test_import_peftjax_loads_no_heavy_library() -> None:
    code = f"import sys, peftjax; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_transformers_is_imported_with_the_first_tokenizer_and_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None  # as where it is not installed
import peftjax
from peftjax import evaluate, list_methods, sweep
from peftjax.generate import main
from peftjax.train import main
from peftjax.plan import plan
list_methods.main(["--method=ia3"])
assert "transformers" not in sys.modules
tokenizer = peftjax.load_tokenizer("embedded")
assert "transformers" in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_a_command_imports_no_torch_where_it_is_installed_but_other_programs_do(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('torch is imported')")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
    )
    load = "import peftjax; from peftjax.core import cli; load = lambda _: peftjax.load_tokenizer('embedded') and None"
    ends = [
        subprocess.run(
            [sys.executable, "-c", f"{load}; {call}"],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"},
            capture_output=True,
            text=True,
            check=False,
        )
        for call in ("cli.run(load)", "load([])")
    ]
    assert [end.returncode for end in ends] == [0, 1], ends
    assert "torch is imported" in ends[1].stderr
