"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch in one thread: threads that wait for one another make tiny networks many times slower."""
    import torch  # here: most tests of the mathematics do without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
