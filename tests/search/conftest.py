"""A toy sampler with real rollouts."""

from __future__ import annotations

import pytest

from tests.search.toy import Toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()
