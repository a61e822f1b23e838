"""Pages of the site that are written from the code: commands, errors, and the public names of a package."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import click

from sparsedelta.cli import main
from sparsedelta.cli._help import GROUPS, option_groups
from sparsedelta.errors import by_code

ROOT = Path(__file__).resolve().parents[2]
_INTROS = {
    "sparsedelta": "The public names of `sparsedelta`. Paths may be `str` or `Path`. Errors are [here](errors.md).",
    "sparsedelta.distributed": "Deltas that all ranks make together, and checkpoints of torch.distributed as deltas on the one before;"
    " all ranks must call them ([how](../docs/distributed.md#a-delta-of-any-sharded-model)).",
    "sift_train": "The public names of `sift_train`. How they belong together: [training](../docs/training.md).",
}


def commands_page() -> str:
    """Return the reference of all commands: what `--help` shows, with a heading for each command."""
    parts = [
        "# Commands",
        "Written from the code; `sparsedelta COMMAND --help` shows the same. Options that every command has:"
        " `--debug` shows the traceback of an error, `-q` hides progress and notes.",
    ]
    context = click.Context(main, info_name="sparsedelta")
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        for name in names:
            command = main.get_command(context, name)
            if command is not None:
                parts += _command(command, click.Context(command, info_name=name, parent=context))
    return "\n\n".join(parts) + "\n"


def _command(command: click.Command, ctx: click.Context) -> list[str]:
    usage = " ".join(command.collect_usage_pieces(ctx)[1:])
    parts = [f"### {command.name}", f"`sparsedelta {command.name} [OPTIONS] {usage}`"]
    parts.append(inspect.cleandoc(command.help or ""))
    records = [
        record
        for title, options in option_groups(command.params).items()
        if title != "General"
        for option in options
        if (record := option.get_help_record(ctx)) is not None
    ]
    if records:
        rows = [f"| `{name}` | {_cell(text)} |" for name, text in records]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *rows]))
    lines = (command.epilog or "").replace("\b", "").strip().splitlines()[1:]
    parts.append("\n".join(["```console", *(f"$ {line.strip()}" for line in lines), "```"]))
    return parts


def _cell(text: str) -> str:
    return (
        " ".join(text.split())
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("`hf auth login`", "hf auth login")
    )


def errors_page() -> str:
    """Return the reference of all errors."""
    parts = [
        "# Errors",
        "All are subclasses of `sparsedelta.SparseDeltaError`, in `sparsedelta.errors`. Each has a `code`, which does not"
        " change between releases, and `tensor`, `expected` and `found` where they apply. A missing file, or an output that exists,"
        " raises Python's own `OSError`. `sparsedelta explain CODE` shows the same.",
    ]
    for code, error in by_code().items():
        meaning = (inspect.getdoc(error) or "").partition("\n")[0]
        parents = ", ".join(f"`{one.__name__}`" for one in error.__bases__)
        parts += [
            f"## {code}",
            f"`{error.__name__}`, a {parents}. {meaning}",
            f"**What to do.** {error.remedy}",
        ]
    return "\n\n".join(parts) + "\n"


def package_page(package: str) -> str:
    """Return a page with the docstring of each public name of a package."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    places = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    parts = [f"# {package}", _INTROS[package]]
    for name in names:
        if name in places:
            parts.append(f"::: {places[name]}")
    return "\n\n".join(parts) + "\n"
