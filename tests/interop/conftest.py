"""Fixtures of the tests beside torch, transformers and peft."""

import contextlib
import os
import shutil
import subprocess
import sys
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
    """SmolLM2-135M-Instruct, built once and kept in .cache/smollm2_135m."""
    kept = Path(__file__).resolve().parents[2] / ".cache" / "smollm2_135m"
    if not kept.exists():
        made = kept.with_name(f"smollm2_135m-{os.getpid()}")  # several test processes may build it at the same time
        script = assets / "smollm2_135m" / "make.py"
        built = subprocess.run([sys.executable, script, made], capture_output=True, text=True, check=False)
        if built.returncode:
            pytest.skip(f"{script} failed: {built.stderr.strip().splitlines()[-1]}")
        with contextlib.suppress(OSError):  # another process was first
            made.rename(kept)
        shutil.rmtree(made, ignore_errors=True)
    return kept
