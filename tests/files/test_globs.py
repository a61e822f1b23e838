"""Hints give globs that match the files concerned and no others."""

from __future__ import annotations

import pytest

from sparsedelta.files import junk
from sparsedelta.files.globs import covering


@pytest.mark.parametrize(
    ("paths", "others", "globs"),
    [
        (["a.bin"], ["b.json"], ["a.bin"]),
        (["a.bin", "sub/b.bin"], ["b.json"], ["*.bin"]),
        (["a.json", "b.json"], ["config.json"], ["a.json", "b.json"]),
        (["s/a.json", "s/b.json"], ["config.json"], ["s/*"]),
        (["s/a.json", "s/b.json", "c.bin", "d.bin"], ["config.json"], ["s/*", "*.bin"]),
        (["s/x", "s/y"], ["s/z"], ["s/x", "s/y"]),
        (["a[1].x y", "b[1].x y"], [], ["*.x y"]),
        (["a[1].bin"], ["a1.bin"], ["a[[]1].bin"]),
        ([".gitattributes", "README.md"], ["x.json"], [".gitattributes", "README.md"]),
        ([], ["a"], []),
    ],
)
def test_covering(paths: list[str], others: list[str], globs: list[str]) -> None:
    found = covering(paths, others)
    assert found == globs
    assert all(junk.matches(path, found) for path in paths)
    assert not any(junk.matches(path, found) for path in others)
