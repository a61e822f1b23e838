"""The rooms of the house: who may import whom, and what stays out until it is needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from helpers import noise, write_file

import sparsedelta

ROOT = Path(sparsedelta.__file__).parents[1]
PACKAGE = ROOT / "sparsedelta"

# A module imports only from its own room and from those before it.
ROOMS = (
    "ground",
    "codecs",
    "stores",
    "format",
    "files",
    "tensors",
    "ops",
    "report",
    "live",
    "hub",
    "interop",
    "distributed",
    "channel",
    "cli",
    "top",
)
GROUND = {"errors", "dtypes", "progress", "redaction", "_typing", "fs", "interrupts", "system"}
TOP = {"__init__", "__main__"}

# What the thin methods of ``Delta``, ``diff`` of a model or a repository, ``open_store``, ``opened_all``
# and checkpoints of torch.distributed import when they are called.
LATE = {
    ("format.delta", "live.inplace"),
    ("format.delta", "hub.push"),
    ("ops.diff", "live.sides"),
    ("ops.diff", "hub.sources"),
    ("stores", "hub.store"),
    ("format.delta", "interop.opening"),
    ("ops.apply", "interop.opening"),
    ("ops.base_check", "interop.regions"),
}
# The package itself is a table of the public names, for the command line. Its version is for all.
FACE_ROOMS = {"cli", "top"}
FACE_MODULES = {"hub.client"}

# The only rooms that may import these, torch only inside a function.
LAZY: dict[str, set[str]] = {
    "torch": {"live", "interop", "distributed"},
    "huggingface_hub": {"hub"},
    "transformers": {"live"},
    "diffusers": {"live"},
    "triton": {"live"},
    "fsspec": {"stores"},
    "vllm": {"channel"},
    "sift_train": set(),
}
# Its classes are subclasses of torch's, and no other room imports it.
ROOMS_AT_ONCE = {"distributed"}
# The types of a model are named where all rooms can see them, and where tensors are passed to engines.
TYPES_ONLY = {
    ("_typing", "torch"),
    ("channel.ranks", "torch"),
    *((f"channel.receivers.{name}", "torch") for name in ("mirror", "sglang", "trl", "vllm")),
}
# Only imported on a GPU. Kernels must be at the top of a module.
AT_ONCE = {("live.triton_kernels", "triton")}
# What may be imported from outside at all.
OUTSIDE = {"blake3", "numpy", "zstandard"}
OUTSIDE_OF_ROOM = {
    "cli": OUTSIDE | {"click", "rich"},
    "report": OUTSIDE | {"rich"},
    "interop": OUTSIDE | {"xxhash", "yaml"},
}
# What the pure rooms do without.
FILES = {"os", "io", "pathlib", "tempfile", "shutil", "mmap", "socket", "torch"}
# The kernels read an environment variable.
PURE_EXCEPTIONS = {("codecs.kernels", "os")}


class Import(NamedTuple):
    """A name that a module imports; ``when``: at once, late (in a function) or only for types."""

    name: str
    when: Literal["at once", "late", "types"]


def imports(path: Path) -> Iterator[Import]:
    """Yield all that a module imports: modules, and what may be one or a name in one."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), "at once")


def _imports(node: ast.AST, when: Literal["at once", "late", "types"]) -> Iterator[Import]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        when = "late"
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, when)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield Import(f"{'.' * node.level}{node.module or ''}:{alias.name}", when)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for inner in node.body:
            yield from _imports(inner, "types")
        for inner in node.orelse:
            yield from _imports(inner, when)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, when)


def room(module: str) -> str:
    first = module.partition(".")[0]
    return "ground" if module in GROUND else "top" if module in TOP else first


def modules_of(package: Path) -> dict[str, Path]:
    """Return the modules by name without the package's; the package itself is ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts)
        found[name if len(parts) == 1 else name.removesuffix(".__init__")] = path
    return found


def own(name: str, modules: Mapping[str, Path]) -> str | None:
    """Return the module of the package that an import is of; None if it is another package's."""
    module, _, attribute = name.partition(":")
    if module.partition(".")[0] != "sparsedelta":
        return None
    module = module.partition(".")[2]
    inner = f"{module}.{attribute}".strip(".")
    if attribute and inner in modules:
        return inner
    return module or "__init__"


def faults(package: Path) -> set[str]:
    """Return what is wrong with the imports of a package of rooms."""
    modules = modules_of(package)
    found = set()
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        if room(name) not in ROOMS:
            found.add(f"{name}: in no room")
            continue
        for imported, when in imports(path):
            if imported.startswith("."):
                found.add(f"{name}: imports relatively")
                continue
            wanted = own(imported, modules)
            if wanted is None:
                found |= _outside_faults(name, imported.partition(":")[0], when)
            elif wanted == "__init__":
                if room(name) not in FACE_ROOMS and name not in FACE_MODULES:
                    found.add(f"{name}: imports the package itself")
            elif wanted not in modules:
                found.add(f"{name}: imports {wanted}, which is not there")
            elif (name, wanted) not in LATE or when != "late":
                graph[name].add(wanted)
                if room(wanted) in ROOMS and ROOMS.index(room(wanted)) > ROOMS.index(room(name)):
                    found.add(f"{name}: imports {wanted}, of a later room")
    return found | _circles(graph)


def _outside_faults(name: str, imported: str, when: str) -> set[str]:
    found = set()
    top = imported.partition(".")[0]
    if room(name) == "codecs" and top in FILES and (name, top) not in PURE_EXCEPTIONS:
        found.add(f"{name}: codecs import {top}")
    if top in LAZY:
        if room(name) not in LAZY[top] and not ((name, top) in TYPES_ONLY and when == "types"):
            found.add(f"{name}: imports {top}")
        elif when == "at once" and room(name) not in ROOMS_AT_ONCE and (name, top) not in AT_ONCE:
            found.add(f"{name}: imports {top} at once")
    elif top not in sys.stdlib_module_names | OUTSIDE_OF_ROOM.get(room(name), OUTSIDE):
        found.add(f"{name}: imports {top}")
    return found


def _circles(graph: Mapping[str, set[str]]) -> set[str]:
    left = {name: needs - {"__init__"} for name, needs in graph.items() if name != "__init__"}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    # Of what is left, those that nobody in a circle needs are only on the way to one.
    while outer := left.keys() - set().union(*left.values()):
        left = {name: needs for name, needs in left.items() if name not in outer}
    return {f"a circle among {', '.join(sorted(left))}"} if left else set()


def test_rooms_are_in_order() -> None:
    assert faults(PACKAGE) == set()


def test_every_module_is_looked_at() -> None:
    modules = modules_of(PACKAGE)
    assert len(modules) == len(list(PACKAGE.rglob("*.py")))
    assert {"codecs.indices.gaps", "codecs.packings", "ops.stacking.fold"} <= modules.keys()


LIKE_OURS = {
    "__init__": "if TYPE_CHECKING:\n    from sparsedelta.ops.apply import apply\n",
    "errors": "import os\n",
    "_typing": "if TYPE_CHECKING:\n    import torch\n",
    "codecs/chunk": "import numpy\nfrom sparsedelta.errors import Corrupt\n",
    "codecs/deep/er": "from sparsedelta.codecs import chunk\n",
    "format/delta": "def apply_():\n    from sparsedelta.live.inplace import apply_\n",
    "ops/apply": "from sparsedelta.format.delta import Delta\n",
    "live/inplace": "from sparsedelta.format.delta import Delta\ndef f():\n    import torch\n",
    "hub/push": "from sparsedelta.ops.apply import apply\nif TYPE_CHECKING:\n    import huggingface_hub\n",
    "hub/client": "def f():\n    import sparsedelta\n",
    "cli/apply": "import click\nimport sparsedelta\n",
}
TYPES = "if TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("errors", "", None),
        ("errors", "from sparsedelta.codecs.chunk import Chunk", "of a later room"),
        ("codecs/deep/er", "import os", "codecs import os"),
        ("codecs/deep/er", "from io import BytesIO", "codecs import io"),
        ("codecs/deep/er", "def f():\n    import torch", "codecs import torch"),
        ("codecs/deep/er", "from sparsedelta.format.delta import Delta", "of a later room"),
        ("codecs/deep/er", TYPES + "from sparsedelta.format import delta", "of a later room"),
        ("codecs/chunk", TYPES + "from sparsedelta.codecs.deep.er import X", "a circle among"),
        ("codecs/chunk", "def f():\n    import sparsedelta.codecs.deep.er", "a circle among"),
        ("format/delta", TYPES + "from sparsedelta.live.inplace import Check", "of a later room"),
        ("format/delta", "def f():\n    from sparsedelta.ops.apply import apply", "a circle among"),
        ("ops/apply", "def f():\n    import torch", "imports torch"),
        ("_typing", "import torch", "imports torch"),
        ("ops/apply", "def f():\n    import huggingface_hub.errors", "imports huggingface_hub"),
        ("ops/apply", "def f():\n    import sparsedelta", "imports the package itself"),
        ("ops/apply", "from .diff import diff", "imports relatively"),
        ("ops/apply", "from sparsedelta._diff import diff", "which is not there"),
        ("live/inplace", "import torch", "imports torch at once"),
        ("hub/push", "import huggingface_hub", "imports huggingface_hub at once"),
        ("hub/push", "def f():\n    import sift_train", "imports sift_train"),
        ("hub/push", "import requests", "imports requests"),
        ("hub/push", "import click", "imports click"),
        ("cli/apply", TYPES + "import sift_train", "imports sift_train"),
        ("attic/old", "import os", "in no room"),
    ],
)
def test_forbidden_import_is_found(
    module: str, line: str, fault: str | None, tmp_path: Path
) -> None:
    for name, text in (LIKE_OURS | {module: f"{LIKE_OURS.get(module, '')}{line}\n"}).items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    found = faults(tmp_path)
    if fault is None:
        assert found == set()
    else:
        assert any(fault in one for one in found), found


def test_training_uses_only_the_public_face() -> None:
    from sparsedelta import distributed  # imports torch

    public = {*sparsedelta.__all__, *(f"distributed.{name}" for name in distributed.__all__)}
    for path in sorted((ROOT / "sift_train").rglob("*.py")):
        for imported, _ in imports(path):
            name = imported.replace(":", ".")
            if name.startswith("sparsedelta."):
                assert name.removeprefix("sparsedelta.") in public, f"{path}: {name}"


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


def test_importing_the_training_loads_no_library_that_takes_seconds() -> None:
    loaded = loaded_by("import sift_train")
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "accelerate", "transformers", "huggingface_hub"}


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
    assert "sparsedelta.ops.apply" in loaded
    assert not loaded & {"torch", "huggingface_hub", "transformers", "safetensors", "sift_train"}
    assert not loaded & {"click", "rich"}
