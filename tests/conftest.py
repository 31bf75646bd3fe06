"""Fixtures that several test files share."""

from __future__ import annotations

import os
import venv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests: each file of them has a folder of its own."""
    before = os.environ.get("NASDEPLOY_CACHE")
    os.environ["NASDEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["NASDEPLOY_CACHE"]
    else:
        os.environ["NASDEPLOY_CACHE"] = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch in one thread: threads that wait for one another make tiny networks many times slower."""
    import torch  # here: most tests of the mathematics do without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has numpy and onnxruntime, and neither nasdeploy nor torch nor onnx: what a device has."""
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in ("numpy", "onnxruntime"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        for part in Path(spec.origin).parent.parent.glob(f"{name}*"):  # its libraries and its version too
            (packages / part.name).symlink_to(part)
    return folder / "bin" / "python"
