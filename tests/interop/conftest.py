"""Fixtures of the tests beside torch, transformers and peft."""

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
