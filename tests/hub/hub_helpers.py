"""Helpers for the tests of the Hub: checkpoints, and people who run commands against a Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import Raw, noise, write, write_file, write_sharded
from hub.hub_server import LoopbackHub

import sparsedelta

SOURCE = Path(sparsedelta.__file__).parents[1]
TOKEN = "hf_SecretOfMe123"
BASE = "org/model"
TUNED = "me/tuned"
BASE_CARD = """---
license: other
license_name: model-license
license_link: LICENSE
language:
- en
pipeline_tag: text-generation
---

# The base
"""
LAYERS = 3
# All warnings are errors, except the client's own about its use of its HTTP library.
WARNINGS = ("-W", "error", "-W", "ignore:Use 'content=<:DeprecationWarning")
INFO: dict[str, Any] = {"sift": {"rate": 0.01, "selection": "gradient"}, "steps": 150}


class Shell:
    """Runs each command line in its own process; see ``zygote``."""

    def __init__(self, scratch: Path) -> None:
        self._files = scratch / "stdout", scratch / "stderr"
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING"))}
        paths = os.pathsep.join([str(SOURCE), str(Path(__file__).parents[1])])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env={**kept, "PYTHONPATH": paths, "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, arguments: list[str], folder: Path, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "environment": environment,
            "stdout": str(self._files[0]),
            "stderr": str(self._files[1]),
        }
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        code = json.loads(stdout.readline())
        shown = [place.read_text("utf-8") for place in self._files]
        return subprocess.CompletedProcess(arguments, code, *shown)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@dataclass
class Person:
    """A user of a Hub, with their own folder, cache and token."""

    hub: LoopbackHub
    folder: Path
    shell: Shell
    token: str | None = TOKEN
    offline: bool = False
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.folder / "home" / "hub"

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in the person's folder, in its own process."""
        environment = {**self.environment(), **self.variables, **variables}
        return self.shell.run([str(one) for one in arguments], self.folder, environment)

    def python(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the person's folder."""
        return subprocess.run(
            [sys.executable, *WARNINGS, *map(str, arguments)],
            cwd=self.folder,
            env={**self.environment(), **self.variables, **variables},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=120,
        )

    def good(self, *arguments: str | Path, **variables: str) -> str:
        """Run the command line, check that it succeeds, and return its stdout."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bad(self, *arguments: str | Path, **variables: str) -> str:
        """Run the command line, check that it fails with one line on stderr, and return that line."""
        done = self.run(*arguments, **variables)
        assert (done.returncode, done.stdout) == (1, ""), (done.stdout, done.stderr)
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert TOKEN not in done.stderr
        return lines[0]

    def json(self, *arguments: str | Path) -> Any:
        """Run the command line with ``--json``; return the parsed result."""
        return json.loads(self.good(*arguments, "--json"))

    def environment(self) -> dict[str, str]:
        """Return the environment of the person's processes."""
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING"))}
        return {
            **kept,
            "PYTHONPATH": str(SOURCE),
            "HOME": str(self.folder),
            "HF_HOME": str(self.folder / "home"),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": self.token} if self.token else {}),
            **({"HF_HUB_OFFLINE": "1"} if self.offline else {}),
        }


def make_tensors() -> tuple[dict[str, Raw], dict[str, Raw]]:
    """Return the tensors of the base, shard by shard."""
    layers = {
        f"model.layers.{n}.{kind}.weight": noise("BF16", 64, 48, seed=(n, kind))
        for n in range(LAYERS)
        for kind in ("q_proj", "mlp")
    }
    return layers, {"embed.weight": noise("F32", 20, 48), "norm.bias": noise("F32", 48)}


def make_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Write a sharded base and a fine-tune of it; return both."""
    base, target = folder / "base", folder / "target"
    layers, rest = make_tensors()
    tuned = {
        name: tensor.changed(2 * n, 640, 4096) if "q_proj" in name else tensor
        for n, (name, tensor) in enumerate(layers.items())
    }
    write_sharded(base, [layers, rest])
    write_sharded(target, [tuned, rest])
    for place, text in ((base, "base"), (target, "tuned")):
        write(place / "config.json", json.dumps({"model_type": "llama", "name": text}))
        write(place / "tokenizer.json", "[]")
    return base, target


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by relative path."""
    return {
        place.relative_to(folder).as_posix(): place.read_bytes()
        for place in sorted(folder.rglob("*"))
        if place.is_file()
    }


def publish(hub: LoopbackHub, repo_id: str, folder: Path, card: str | None = None) -> str:
    """Upload a checkpoint and files that no command needs to a repository; return the commit."""
    files = files_of(folder)
    if card is not None:
        files["README.md"] = card.encode()
    extra = write_file(folder.parent / "extra.safetensors", {"other": noise("F32", 1000)})
    files |= {"consolidated.safetensors": extra.read_bytes(), "pytorch_model.bin": b"\0" * 5000}
    hub.state.add_repo(repo_id, files)
    return hub.state.head(repo_id).oid


def save_delta(
    base: Path,
    target: Path,
    path: Path,
    *,
    base_id: str | None = None,
    info: Mapping[str, Any] = INFO,
) -> Path:
    """Write the delta between two checkpoints."""
    with sparsedelta.diff(base, target, base_id=base_id, info=info) as delta:
        delta.save(path)
    return path
