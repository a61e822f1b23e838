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
        ".hidden",
        "a b",
        "é/🙂",
        "-rf",
        "~",
        "x" * 255,
        "/".join(["x" * 200] * 20),
        "CONFIG",
        "COM",
        "com10",
        "a.con",
        ".gitignore",
        ".git.d",
        " a",
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
        ("a\\b", "holds a control"),
        *((f"a{letter}b", "holds a control") for letter in ':*?"<>|'),
        ("a\0", "control"),
        ("a\n", "control"),
        ("a\x7f", "control"),
        ("x" * 256, "255"),
        ("é" * 128, "255"),
        ("/".join(["x" * 255] * 17), "4096"),
        ("a\udcff", "UTF-8"),
        ("a.", "dot or a space"),
        ("a /b", "dot or a space"),
        (".../b", "dot or a space"),
        (".git", "git can run"),
        ("a/.GIT/config", "git can run"),
        ("con", "Windows reserves"),
        ("a/NuL.tar.gz/b", "Windows reserves"),
        ("COM0", "Windows reserves"),
        ("lpt9.txt", "Windows reserves"),
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
        with pytest.raises(Corrupt, match="lies in"):
            check_paths(nested)


def test_paths_are_compared_without_case_and_form() -> None:
    check_paths(["a", "\u00e4", "\u00df/x", "s/x"])
    for twins in (["a", "A"], ["\u00e4", "A\u0308"], ["stra\u00dfe", "STRASSE"], ["a/B", "A/b"]):
        with pytest.raises(Corrupt, match="that ignores case"):
            check_paths(twins)
    for nested in (["B", "b/c"], ["\u00c4/x", "a\u0308"], ["a/B!", "A/b", "A/B/c"]):
        with pytest.raises(Corrupt, match="lies in"):
            check_paths(nested)
