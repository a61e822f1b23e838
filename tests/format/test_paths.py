"""Paths in a delta stay inside the output folder and do not shadow each other."""

from __future__ import annotations

import pytest

from sparsedelta.errors import Corrupt
from sparsedelta.format.paths import check_paths, path_problem


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "1_Pooling/config.json",
        "...",
        ".hidden",
        "a b",
        "é/🙂",
        "-rf",
        "~",
        "x" * 255,
        "/".join(["x" * 200] * 20),
        "CON",
    ],
)
def test_allowed(path: str) -> None:
    assert path_problem(path) is None


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "plain relative"),
        ("/etc/passwd", "plain relative"),
        ("..", "plain relative"),
        ("a/../b", "plain relative"),
        ("./a", "plain relative"),
        ("a/.", "plain relative"),
        ("a//b", "plain relative"),
        ("a/", "plain relative"),
        ("a\\b", "backslash"),
        ("C:a", "colon"),
        ("a\0", "control"),
        ("a\n", "control"),
        ("a\x7f", "control"),
        ("x" * 256, "255"),
        ("é" * 128, "255"),
        ("/".join(["x" * 255] * 17), "4096"),
        ("a\udcff", "UTF-8"),
    ],
)
def test_refused(path: str, problem: str) -> None:
    assert problem in (path_problem(path) or "")
    with pytest.raises(Corrupt, match=problem):
        check_paths(["fine", path])


def test_equal_and_nested_paths_are_refused() -> None:
    check_paths(["a", "b/c", "b/d", "b.x", "b-x/y", "ab/c"])
    with pytest.raises(Corrupt, match="twice"):
        check_paths(["a", "b", "a"])
    for nested in (["b", "b/c"], ["b/c/d", "b!", "b-", "b"], ["b/c", "b/c/d/e"]):
        with pytest.raises(Corrupt, match="lies in a path"):
            check_paths(nested)
