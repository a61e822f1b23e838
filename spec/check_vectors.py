"""Check that vectors guard every check of the reference decoder: `python check_vectors.py`.

A check is a call `check(...)` or a statement `raise Refused(...)`. Each one that refuses a vector is
left out, and the vectors that it refused are decoded again. One of them must show the difference:
it is accepted, has another code than its own, or raises an error that is not Refused.
"""

from __future__ import annotations

import ast
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from vector_source import Invalid, invalid_vectors, sample_base

SPEC = Path(__file__).parent
SECONDS = 2.0  # of the CPU: a decoder that takes longer for one vector has noticed
MODULES = (
    "_reference_json",
    "_reference_structure",
    "_reference_bits",
    "_reference_base",
    "reference_decoder",
)


@dataclass
class Sites:
    """Where checks stand; `last` is the one that refused last, `left_out` the one left out."""

    places: list[str] = field(default_factory=list)
    last: int | None = None
    left_out: int | None = None

    def check(self, site: int, ask: Callable[[], tuple[bool, str, str]], error: Any) -> None:
        """Do what a check does, unless it is left out."""
        if site != self.left_out:
            ok, code, message = ask()
            if not ok:
                self.last = site
                raise error(code, message)

    def refuse(self, site: int) -> bool:
        """Return whether a statement `raise Refused(...)` is run."""
        self.last = self.last if site == self.left_out else site
        return site != self.left_out


class Instrumented(ast.NodeTransformer):
    """Gives each check of a module a number, by which it can be left out."""

    def __init__(self, sites: Sites, module: str) -> None:
        self.sites = sites
        self.module = module

    def new_site(self, node: ast.AST) -> ast.Constant:
        """Return the number of a check."""
        line = getattr(node, "lineno", 0)
        self.sites.places.append(f"{self.module}.py:{line}: {ast.unparse(node)}")
        return ast.Constant(len(self.sites.places) - 1)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Leave the function `check` itself as it is."""
        return node if node.name == "check" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace `check(ok, code, message)` by one that has a number."""
        if not (isinstance(node.func, ast.Name) and node.func.id == "check"):
            return self.generic_visit(node)
        site = self.new_site(node)
        ask = ast.Lambda(
            ast.arguments([], [], None, [], [], None, []), ast.Tuple(node.args, ast.Load())
        )
        method = ast.Attribute(ast.Name("__sites__", ast.Load()), "check", ast.Load())
        return ast.Call(method, [site, ask, ast.Name("Refused", ast.Load())], [])

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Put `raise Refused(...)` under a condition; without it, another error is raised."""
        is_refused = isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "Refused"
        if not is_refused:
            return node
        method = ast.Attribute(ast.Name("__sites__", ast.Load()), "refuse", ast.Load())
        asked = ast.Call(method, [self.new_site(node)], [])
        other = ast.Raise(ast.Call(ast.Name("RuntimeError", ast.Load()), [], []), None)
        return ast.If(asked, [node], [other])


@contextmanager
def instrumented() -> Iterator[tuple[ModuleType, Sites]]:
    """Yield the reference decoder with numbered checks; the modules themselves stay as they are."""
    sites = Sites()
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    try:
        for name in MODULES:
            path = SPEC / f"{name}.py"
            tree = Instrumented(sites, name).visit(ast.parse(path.read_bytes()))
            module = ModuleType(name)
            sys.modules[name] = module
            json_module = sys.modules["_reference_json"]
            module.__dict__["__sites__"] = sites
            if module is not json_module:
                module.__dict__["Refused"] = json_module.__dict__["Refused"]
            exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)
        yield sys.modules["reference_decoder"], sites
    finally:
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before:
                sys.modules[name] = module_before


def too_long(*_: object) -> None:
    """End what a decoder without one of its checks does for ever."""
    raise TimeoutError


def outcome(decoder: ModuleType, sites: Sites, vector: Invalid, folder: Path) -> str:
    """Return the code of a vector, `accepted`, or the name of another error."""
    path, out = folder / "delta.sd", folder / "out"
    path.write_bytes(vector.delta)
    sites.last = None
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        if vector.on_apply:
            decoder.apply(folder / "base", path, out)
            out.rename(folder / f"out-{len(list(folder.iterdir()))}")
        else:
            decoder.decode(path)
    except decoder.Refused as error:
        return str(error.code)
    except Exception as error:
        return type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted"


def unguarded() -> list[str]:
    """Return the checks that no vector guards, each with its place."""
    with tempfile.TemporaryDirectory() as name, instrumented() as (decoder, sites):
        folder = Path(name)
        for path, content in sample_base().files().items():
            (folder / "base" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "base" / path).write_bytes(content)
        refused: dict[int, list[Invalid]] = {}
        for vector in invalid_vectors():
            found = outcome(decoder, sites, vector, folder)
            if found != vector.code:
                raise ValueError(f"{vector.name} has the outcome {found}")
            if sites.last is not None:
                refused.setdefault(sites.last, []).append(vector)
        missing = []
        for site, place in enumerate(sites.places):
            sites.left_out = site
            vectors = refused.get(site, [])
            if all(outcome(decoder, sites, one, folder) == one.code for one in vectors):
                missing.append(f"{place} ({len(vectors)} vectors)")
        return missing


def main() -> int:
    """Run the script; return its exit status."""
    missing = unguarded()
    print(json.dumps(missing, indent=1) if missing else "every check is guarded")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
