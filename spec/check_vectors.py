"""Check that the vectors test every check of the reference decoder: `python check_vectors.py`.

A check is a call `check(...)` or a statement `raise Refused(...)`. The script removes one check after the
other, and decodes the vectors that this check refuses again. Without the check, at least one of them must
have another outcome: it is accepted, has another error code, or raises another error than Refused.
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
SECONDS = 2.0  # of CPU time: a decoder that takes longer for one vector counts as another outcome
MODULES = (
    "_reference_json",
    "_reference_structure",
    "_reference_bits",
    "_reference_base",
    "reference_decoder",
)


@dataclass
class Checks:
    """All checks of the decoder, by number.

    Attributes:
        lines: file, line and code of each check.
        last: number of the check that refused last.
        removed: number of the check that is removed; None: none is.
    """

    lines: list[str] = field(default_factory=list)
    last: int | None = None
    removed: int | None = None

    def check(
        self, number: int, arguments: Callable[[], tuple[bool, str, str]], error: Any
    ) -> None:
        """Run a check, unless it is removed."""
        if number != self.removed:
            ok, code, message = arguments()
            if not ok:
                self.last = number
                raise error(code, message)

    def refuse(self, number: int) -> bool:
        """Return whether to run a statement `raise Refused(...)`: not if it is removed."""
        self.last = self.last if number == self.removed else number
        return number != self.removed


class Instrumented(ast.NodeTransformer):
    """Rewrites a module so that each of its checks has a number and can be removed."""

    def __init__(self, checks: Checks, module: str) -> None:
        self.checks = checks
        self.module = module

    def new_number(self, node: ast.AST) -> ast.Constant:
        """Add a check to the list; return its number."""
        line = getattr(node, "lineno", 0)
        self.checks.lines.append(f"{self.module}.py:{line}: {ast.unparse(node)}")
        return ast.Constant(len(self.checks.lines) - 1)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Do not rewrite the function `check` itself."""
        return node if node.name == "check" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace `check(ok, code, message)` with a call of `Checks.check`."""
        if not (isinstance(node.func, ast.Name) and node.func.id == "check"):
            return self.generic_visit(node)
        number = self.new_number(node)
        arguments = ast.Lambda(
            ast.arguments([], [], None, [], [], None, []), ast.Tuple(node.args, ast.Load())
        )
        method = ast.Attribute(ast.Name("__checks__", ast.Load()), "check", ast.Load())
        return ast.Call(method, [number, arguments, ast.Name("Refused", ast.Load())], [])

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Make `raise Refused(...)` conditional; if it is removed, RuntimeError is raised instead."""
        is_refused = isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "Refused"
        if not is_refused:
            return node
        method = ast.Attribute(ast.Name("__checks__", ast.Load()), "refuse", ast.Load())
        condition = ast.Call(method, [self.new_number(node)], [])
        other = ast.Raise(ast.Call(ast.Name("RuntimeError", ast.Load()), [], []), None)
        return ast.If(condition, [node], [other])


@contextmanager
def instrumented() -> Iterator[tuple[ModuleType, Checks]]:
    """Yield a rewritten copy of the reference decoder, and its checks."""
    checks = Checks()
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    try:
        for name in MODULES:
            path = SPEC / f"{name}.py"
            tree = Instrumented(checks, name).visit(ast.parse(path.read_bytes()))
            module = ModuleType(name)
            sys.modules[name] = module
            json_module = sys.modules["_reference_json"]
            module.__dict__["__checks__"] = checks
            if module is not json_module:
                module.__dict__["Refused"] = json_module.__dict__["Refused"]
            exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)
        yield sys.modules["reference_decoder"], checks
    finally:
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before:
                sys.modules[name] = module_before


def too_long(*_: object) -> None:
    """Stop a decoder that loops for ever without one of its checks."""
    raise TimeoutError


def outcome(decoder: ModuleType, checks: Checks, vector: Invalid, folder: Path) -> str:
    """Return the error code that a vector gets, `accepted`, or the name of another error."""
    path, out = folder / "delta.sd", folder / "out"
    path.write_bytes(vector.delta)
    checks.last = None
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


def untested() -> list[str]:
    """Return file, line and code of each check that no vector tests."""
    with tempfile.TemporaryDirectory() as name, instrumented() as (decoder, checks):
        folder = Path(name)
        for path, content in sample_base().files().items():
            (folder / "base" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "base" / path).write_bytes(content)
        refused: dict[int, list[Invalid]] = {}
        for vector in invalid_vectors():
            found = outcome(decoder, checks, vector, folder)
            if found != vector.code:
                raise ValueError(f"vector {vector.name}: outcome {found}, expected {vector.code}")
            if checks.last is not None:
                refused.setdefault(checks.last, []).append(vector)
        missing = []
        for number, line in enumerate(checks.lines):
            checks.removed = number
            vectors = refused.get(number, [])
            if all(outcome(decoder, checks, one, folder) == one.code for one in vectors):
                missing.append(f"{line} ({len(vectors)} vectors)")
        return missing


def main() -> int:
    """Run the script; return its exit status."""
    missing = untested()
    print(json.dumps(missing, indent=1) if missing else "the vectors test every check")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
