"""Fixtures for the tests of operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ops.maker import Maker


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    with ExitStack() as context:
        yield Maker(tmp_path, context)
