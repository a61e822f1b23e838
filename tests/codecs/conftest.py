"""Run the tests of the codecs with both implementations: compiled (if it was built) and numpy."""

from __future__ import annotations

import pytest

from sparsedelta.codecs import kernels


@pytest.fixture(autouse=True, params=["compiled", "numpy"] if kernels.native else ["numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each implementation."""
    way: str = request.param
    if way == "numpy":
        monkeypatch.setattr(kernels, "native", None)
    return way
