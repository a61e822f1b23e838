"""The rooms of the house: who may import whom, and what stays out until it is needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import noise, write_file

import sparsedelta

ROOT = Path(sparsedelta.__file__).parents[1]
PACKAGE = ROOT / "sparsedelta"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The only rooms that may import these, torch only inside a function.
LAZY: dict[str, set[str]] = {
    "torch": {"live"},
    "huggingface_hub": {"hub"},
    "transformers": {"live"},
    "sift_train": set(),
}
# What may be imported from outside at all.
OUTSIDE = {"blake3", "numpy", "zstandard"}
OUTSIDE_CLI = OUTSIDE | {"click", "rich"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the full name of every module imported, and whether when the importer is."""
    syntax = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for outer in ast.walk(syntax)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module, id(node) not in inner
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in inner


def own_modules(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, at once or lazily."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES}
    names |= {name.removesuffix(".__init__") for name in names}
    return {name for name, _ in imports(path)} & names - {"sparsedelta"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


each_module = pytest.mark.parametrize("path", MODULES, ids=room)


@each_module
def test_lazy_packages(path: Path) -> None:
    for name, at_once in imports(path):
        top = name.partition(".")[0]
        if top in LAZY:
            assert room(path).partition("/")[0] in LAZY[top], f"{room(path)} imports {name}"
            assert top == "huggingface_hub" or not at_once, f"{room(path)} imports {name} at once"


@each_module
def test_no_other_packages(path: Path) -> None:
    allowed = OUTSIDE_CLI if "cli" in path.parts else OUTSIDE
    outside = {name.partition(".")[0] for name, _ in imports(path)} - sys.stdlib_module_names
    assert outside - {"sparsedelta"} - LAZY.keys() <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "codecs").glob("*.py")), ids=room)
def test_codecs_know_no_files(path: Path) -> None:
    allowed = {"sparsedelta.errors", "sparsedelta.dtypes"}
    for name in own_modules(path):
        assert name in allowed or name.startswith("sparsedelta.codecs"), name
    assert not {"os", "io", "pathlib"} & {name for name, _ in imports(path)}


def test_lowest_rooms_import_nothing_of_the_package() -> None:
    for name in ("errors", "dtypes", "progress"):
        assert own_modules(PACKAGE / f"{name}.py") == set()


@each_module
def test_only_the_command_line_imports_itself(path: Path) -> None:
    if "cli" not in path.parts and path.stem != "__main__":
        assert not any(name.startswith("sparsedelta.cli") for name in own_modules(path))


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): {
            name for name, at_once in imports(path) if at_once
        }
        for path in MODULES
    }
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys() - {name}}
        assert free, f"circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def test_training_uses_only_the_public_face() -> None:
    for path in sorted((ROOT / "sift_train").rglob("*.py")):
        for name, _ in imports(path):
            if name.startswith("sparsedelta."):
                assert name.removeprefix("sparsedelta.") in sparsedelta.__all__, f"{path}: {name}"


def loaded_by(script: str, *arguments: object) -> set[str]:
    """Return the top-level modules that are loaded after a script has run in a fresh interpreter."""
    script += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_importing_loads_nothing() -> None:
    loaded = loaded_by("import sparsedelta; dir(sparsedelta); sparsedelta.__version__")
    assert {name for name in loaded if name.startswith("sparsedelta.")} == set()
    assert not loaded & {"torch", "numpy", "huggingface_hub", "zstandard", "click", "rich"}


def test_verbs_run_without_torch(tmp_path: Path) -> None:
    tensor = noise("BF16", 40)
    base = write_file(tmp_path / "base", {"w": tensor})
    target = write_file(tmp_path / "target", {"w": tensor.changed(3)})
    script = (
        "import sys, sparsedelta as s; base, target, delta, out = sys.argv[1:]\n"
        "s.diff(base, target).save(delta)\n"
        "s.apply(base, delta, out)\n"
        "s.verify(delta, base=base, target=out)\n"
        "s.inspect(delta)\n"
    )
    loaded = loaded_by(script, base, target, tmp_path / "delta", tmp_path / "out")
    assert "sparsedelta._apply" in loaded
    assert not loaded & {"torch", "huggingface_hub", "transformers", "safetensors", "sift_train"}
    assert not loaded & {"click", "rich"}
