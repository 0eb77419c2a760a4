"""Fixtures of the tests beside torch, transformers and peft."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random Llamas of three layers with grouped queries, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        from tests.interop.peers import BASES, save_base  # torch, which is not there in every environment

        if not (folder / name).exists():
            save_base(folder / name, **BASES[name])
        return folder / name

    return base


@pytest.fixture(scope="session")
def smollm2(assets: Path) -> Path:
    """SmolLM2-135M-Instruct, built once into the temporary directory of the machine, where later sessions find it."""
    script = assets / "smollm2_135m" / "make.py"
    if not script.is_file():
        pytest.skip(f"{script} is missing")
    directory = Path(tempfile.gettempdir()) / "peftjax-smollm2-135m"
    if not directory.exists():
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:  # other processes may be building it too
            subprocess.run([sys.executable, script, f"{scratch}/model"], check=True)
            if not directory.exists():
                Path(scratch, "model").rename(directory)
    return directory
