"""Running a Python file of the user, such as a config."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType


class _SourceLoader(SourceFileLoader):
    """Compiles the file each time: cached bytecode is stale if the file was rewritten in the same second with the same size."""

    def get_code(self, fullname: str) -> CodeType:
        del fullname
        return self.source_to_code(self.get_data(self.path), self.path)


def run_python_file(path: Path, name: str) -> ModuleType:
    """Run a file and return its module, which is in `sys.modules` under `name`: dataclasses look for it there.

    Raises:
        Exception: Whatever the file raises.
    """
    loader = _SourceLoader(name, str(path.absolute()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # as for every loader of source files
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
