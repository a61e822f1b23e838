"""The model card: metadata at its head, and one section between two marks for each delta.

Text outside the marks is never changed. In the metadata, missing members are added and
``base_model`` is kept correct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsedelta._typing import JSON
from sparsedelta.format.paths import WEIGHT_SUFFIX
from sparsedelta.hub.references import DELTA_NAME, Reference
from sparsedelta.ops.inspect import Inspection
from sparsedelta.ops.layers import curve_points
from sparsedelta.ops.scores import recorded_scores
from sparsedelta.redaction import redacted
from sparsedelta.report.png import Picture
from sparsedelta.report.text import numbers, percent, size

LIBRARY = "sparsedelta"
CARD_NAME = "README.md"
TAGS = ("sparsedelta", "sparse-delta")
_FROM_BASE = ("license", "license_name", "license_link", "language", "pipeline_tag")
_MAX_ROWS = 24
_MAX_NUMBERS = 8
_MAX_VALUE = 160
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class CardFacts:
    """The facts that a section of the card shows.

    Attributes:
        repo_id: the repository of the delta.
        path: the delta's path in the repository.
        base: the base, pinned to a commit.
        base_is_delta: whether the base is itself a delta.
        base_metadata: the metadata of the base's card.
        found: what ``inspect`` returned for the delta.
        file_bytes: size of the delta.
        target_bytes: size of the target's files.
        picture: path of the picture in the repository, and what it shows; None: no picture.
        endpoint: address of the Hub.
    """

    repo_id: str
    path: str
    base: Reference
    base_is_delta: bool
    base_metadata: Mapping[str, Any]
    found: Inspection
    file_bytes: int
    target_bytes: int
    picture: tuple[str, Picture] | None
    endpoint: str

    @property
    def source(self) -> str:
        """The argument of ``pull`` that names this delta."""
        if self.path == DELTA_NAME:
            return self.repo_id
        return f"hf://{self.repo_id}/{self.path.removesuffix('/' + DELTA_NAME)}"


def updated_card(
    existing: str | None, facts: CardFacts, *, alone: bool, dropped: str | None = None
) -> str:
    """Return the card with an updated section about a delta, or a new card.

    Args:
        existing: the text of the existing card, or None.
        facts: the contents of the section.
        alone: whether this is the only delta of the repository.
        dropped: the base that no delta of the repository has any more; None: there is none.

    Raises:
        ValueError: the metadata of the existing card is not valid YAML.
    """
    from huggingface_hub import ModelCard, ModelCardData

    section = _between_marks(facts)
    if existing is None:
        head = ModelCardData(**_head(facts))
        title = facts.repo_id.partition("/")[2]
        return f"---\n{head.to_yaml()}\n---\n\n# {title}\n\n{section}\n"
    text = _with_section(existing, section, facts.path)
    try:
        card = ModelCard(text)
    except Exception as error:  # the client does not catch the errors of its YAML parser
        why = " ".join(redacted(str(error)).split())
        raise ValueError(
            f"the metadata of {CARD_NAME} in '{facts.repo_id}' cannot be read: {why}; correct it in the"
            " repository first"
        ) from error
    changes = _head_changes(vars(card.data), facts, alone=alone, dropped=dropped)
    if not changes:
        return text
    for name, value in changes.items():
        setattr(card.data, name, value)
    return str(card)


def _head(facts: CardFacts) -> dict[str, Any]:
    """Return the metadata of a new card."""
    copied = {name: facts.base_metadata.get(name) for name in _FROM_BASE}
    link = copied["license_link"]
    if isinstance(link, str) and "://" not in link:
        # A path relative to the base's repository: make it an absolute address.
        copied["license_link"] = f"{facts.endpoint}/{facts.base.repo_id}/blob/main/{link}"
    found = {
        **{name: value for name, value in copied.items() if value is not None},
        "library_name": LIBRARY,
        "base_model": facts.base.repo_id,
        "base_model_relation": "finetune",
        "tags": [*TAGS],
    }
    if facts.base.repo_id == facts.repo_id:  # deltas beside their base, or on one another
        del found["base_model"], found["base_model_relation"]
    return found


def _head_changes(
    head: Mapping[str, Any], facts: CardFacts, *, alone: bool, dropped: str | None
) -> dict[str, Any]:
    wanted = _head(facts)
    changes = {name: value for name, value in wanted.items() if head.get(name) in (None, [])}
    base, named = wanted.get("base_model"), head.get("base_model")
    bases = [named] if isinstance(named, str) else list(named or [])
    others = [] if alone else [one for one in bases if one not in (base, dropped)]
    if base and bases and (base not in bases or dropped in bases):
        changes["base_model"] = [*others, base] if others else base
    tags = [*(head.get("tags") or [])]
    if LIBRARY not in tags:
        changes["tags"] = [*tags, LIBRARY]
    return changes


def _marks(path: str) -> tuple[str, str]:
    return f"<!-- sparsedelta: begin {path} -->", f"<!-- sparsedelta: end {path} -->"


def _between_marks(facts: CardFacts) -> str:
    begin, end = _marks(facts.path)
    note = "<!-- `sparsedelta push` replaces the text between these marks and keeps the rest. -->"
    return "\n".join([begin, note, "", "\n\n".join(_section(facts)), "", end])


def _with_section(text: str, section: str, path: str) -> str:
    begin, end = _marks(path)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if found and closed:
        return before + section + after
    return text.rstrip("\n") + f"\n\n{section}\n"


def _section(facts: CardFacts) -> Iterator[str]:
    found = facts.found
    base = facts.base
    kind = "itself a delta, " if facts.base_is_delta else ""
    states = ", ".join(f"{n:,} {state}" for state, n in found.states.items() if n)
    sizes = f"{size(facts.file_bytes)} instead of {size(facts.target_bytes)}"
    if facts.path != DELTA_NAME:
        yield f"## `{_code(facts.path)}`"
    yield (
        f"A fine-tune of [{base.repo_id}]({facts.endpoint}/{base.repo_id}) as a **sparse delta:"
        f" {sizes}**. It holds only the values that differ from the base, and rebuilds the whole model"
        " bit for bit."
    )
    yield "\n".join(
        [
            f"| base | {kind}`{base.repo_id}` at commit `{(base.revision or '')[:12]}` |",
            "|---|---|",
            f"| changed | {found.nnz:,} of {found.numel:,} values ({percent(found.density)}) |",
            f"| tensors | {states} |",
            f"| delta | {size(facts.file_bytes)}, {percent(facts.file_bytes / max(1, facts.target_bytes))}"
            " of the model's files |",
        ]
    )
    level = "##" if facts.path == DELTA_NAME else "###"
    parts = [("How to use it", _usage(facts)), ("Before and after", _scores(found.info))]
    if found.nnz:
        parts.append(("Where it changed the model", _where(facts)))
    if found.info:
        parts.append(("How it was made", _table(("setting", "value"), _info(found.info))))
    for title, text in parts:
        if text:
            yield f"{level} {title}\n\n{text}"


def _usage(facts: CardFacts) -> str:
    subfolder, _, file = facts.path.rpartition("/")
    name = subfolder.rpartition("/")[2] or facts.repo_id.partition("/")[2]
    out, then = f"{name}/", "an ordinary model folder"
    if facts.found.target_kind == "file":
        out = name = f"{name}{WEIGHT_SUFFIX}"
        then = "an ordinary weight file"
    more = f', subfolder="{subfolder}"' if file == DELTA_NAME and subfolder else ""
    source = facts.repo_id if more or not subfolder else facts.source
    return "\n".join(
        [
            "```bash",
            "pip install 'sparsedelta[hub]'",
            f"sparsedelta pull {facts.source} {out}    # gets the base, too, and verifies both",
            "```",
            "",
            "Or from Python:",
            "",
            "```python",
            "import sparsedelta",
            "",
            f'sparsedelta.pull("{source}", "{name}"{more})',
            *_loading(facts),
            "```",
            "",
            f"`{out}` is then {then}. Load it as you would load the base.",
        ]
    )


def _loading(facts: CardFacts) -> list[str]:
    """Return the lines that load a model of transformers; none for other models."""
    if not any(file.path == "config.json" for file in facts.found.side_files):
        return []
    return [f'model = sparsedelta.load_model("{facts.source}")  # or load it without a folder']


def _where(facts: CardFacts) -> str:
    table = _table(("tensors", "changed", "of", "density"), _kinds(facts.found))
    if facts.picture is None:
        return table
    path, picture = facts.picture
    grid, shows_change = picture.grid, picture.shows_change
    what = "Mean |change|" if shows_change else "Density"
    # The path is relative to the card, which is at the top of the repository.
    image = f"![{what} of the changes by layer and kind of tensor]({path})"
    highest = f"{picture.scale.high:.3g}" if shows_change else percent(picture.scale.high)
    darker = "the mean change of a value is larger" if shows_change else "more values changed"
    kinds = ", ".join(f"{n} `{_code(kind)}`" for n, kind in enumerate(grid.changed_kinds, 1))
    caption = (
        f"Columns: layers {grid.layers[0]} to {grid.layers[-1]} of `{_code(grid.stack)}` from the left."
        f" Rows, from the top: {kinds}. In a darker cell, {darker}; the highest is {highest}. In a grey"
        " cell, nothing changed."
    )
    return "\n\n".join([image, caption, table])


def _scores(info: Mapping[str, JSON]) -> str:
    """Return a table of the scores before and after the training; empty if the info has none."""
    scores = recorded_scores(info)
    if scores is None:
        return ""
    before = "base" if scores.before_step == 0 else f"step {scores.before_step:,}"
    rows: list[tuple[str, ...]] = [
        (f"`{_code(name)}`", f"{old:.4g}", f"{new:.4g}", f"{new - old:+.3g}")
        for name, old, new in scores.values[:_MAX_ROWS]
    ]
    return _table(("score", before, "this model", "difference"), rows)


def _kinds(found: Inspection) -> list[tuple[str, ...]]:
    sums: dict[str, tuple[int, int]] = {}
    for tensor in found.tensors:
        if tensor.nnz:
            kind = _LAYER_NUMBER.sub("*", tensor.name)
            nnz, numel = sums.get(kind, (0, 0))
            sums[kind] = nnz + tensor.nnz, numel + tensor.numel
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    rows: list[tuple[str, ...]] = [
        (f"`{_code(kind)}`", f"{nnz:,}", f"{numel:,}", percent(nnz / numel))
        for kind, (nnz, numel) in ordered[:_MAX_ROWS]
    ]
    if len(ordered) > _MAX_ROWS:
        rest = ordered[_MAX_ROWS:]
        nnz, numel = sum(n for _, (n, _) in rest), sum(n for _, (_, n) in rest)
        rows.append((f"{len(rest)} more", f"{nnz:,}", f"{numel:,}", percent(nnz / numel)))
    return rows


def _info(info: Mapping[str, JSON]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    points = curve_points(info)
    if points:
        (first, before), (last, after) = points[0], points[-1]
        rows.append(("`loss`", f"{before:.4g} at step {first}, {after:.4g} at step {last}"))
    drawn = {"losses"} if points else set()
    drawn |= {"evaluations"} if recorded_scores(info) else set()
    for name, value in info.items():
        if name in drawn:
            continue
        many = numbers(value, _MAX_NUMBERS)
        group = value if isinstance(value, dict) and not many else {"": many or value}
        for inner, one in group.items():
            label = f"{name}.{inner}" if inner else name
            shown = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
            rows.append((f"`{_code(label)}`", f"`{_code(redacted(shown))}`"))
    return rows


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table. If it has more than two columns, all but the first are numbers."""
    marks = tuple(
        "---:" if len(titles) > 2 and number else "---" for number, _ in enumerate(titles)
    )
    lines = [titles, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    """Return a text from a delta, escaped so that it cannot leave its code span or table cell."""
    plain = "".join(c if c.isprintable() else "?" for c in text).replace("`", "'")
    cut = plain if len(plain) <= _MAX_VALUE else plain[: _MAX_VALUE - 1] + "…"
    return cut.replace("<!--", "<! --").replace("|", "\\|") or " "
