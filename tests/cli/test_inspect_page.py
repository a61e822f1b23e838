"""``sparsedelta inspect --html``: a self-contained page, in which all text of a delta is escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli.cli_helpers import Run, Workplace
from helpers import noise, write_file

import sparsedelta
from sparsedelta.ops.layers import by_layer, curve_points, mean_changes
from sparsedelta.ops.scores import recorded_scores

EVIL = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make_delta(folder: Path, info: dict[str, Any]) -> Path:
    """Return a delta of a model with two layers, three experts in each, and tensors outside the layers."""
    tensors = {
        f"model.layers.{layer}.{kind}": noise("F32", 20, 10)
        for layer in (0, 1)
        for kind in ("attn.q.weight", "mlp.experts.0.w", "mlp.experts.1.w", "mlp.experts.2.w")
    }
    tensors["model.layers.0.norm.weight"] = noise("F32", 5)
    tensors["embed.weight"], tensors[EVIL] = noise("F32", 8, 4), noise("F32", 3)
    changed = {
        "model.layers.0.attn.q.weight": range(0, 200, 4),
        "model.layers.1.mlp.experts.1.w": range(6),
        EVIL: range(1),
    }
    after = {
        name: tensor.changed(*(4 * at for at in changed.get(name, ())))
        for name, tensor in tensors.items()
    }
    write_file(folder / "base.safetensors", tensors)
    write_file(folder / "target.safetensors", after)
    with sparsedelta.diff(
        folder / "base.safetensors", folder / "target.safetensors", base_id=EVIL, info=info
    ) as delta:
        delta.save(folder / "delta.sd")
    return folder / "delta.sd"


def page_of(run: Run, folder: Path, info: dict[str, Any]) -> str:
    html = folder / "page.html"
    result = run("inspect", make_delta(folder, info), "--html", html)
    assert result.exit_code == 0, result.output
    return html.read_text("utf-8")


def test_the_cells_hold_the_densities(run: Run, tmp_path: Path) -> None:
    page = Reader(page_of(run, tmp_path, {}))
    titles = [value for name, value in page.attributes if name == "title"]
    assert titles == [
        "model.layers.0.attn.q.weight: 50 of 200 changed, 25.0 %",
        "model.layers.1.attn.q.weight: 0 of 200 changed, 0 %",
        "model.layers.0.mlp.experts.0.w, model.layers.0.mlp.experts.1.w, "
        "model.layers.0.mlp.experts.2.w: 0 of 600 changed, 0 %",
        "model.layers.1.mlp.experts.0.w, model.layers.1.mlp.experts.1.w, "
        "model.layers.1.mlp.experts.2.w: 6 of 600 changed, 1.00 %",
    ]
    assert {"mlp.", "experts.", "*.", "w", "model.layers: tensors by layer", "delta.sd"} <= set(
        page.text
    )
    assert (
        "model.layers.*.norm.weight" in page.text[page.text.index("Unchanged in every layer: ") + 1]
    )


def test_the_page_is_self_contained_and_escapes_names(run: Run, tmp_path: Path) -> None:
    info: dict[str, Any] = {EVIL: EVIL, "settings": {"lr": 0.1}, "losses": [[1, 2.0], [5, 0.5]]}
    raw = page_of(run, tmp_path, info)
    page = Reader(raw)
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name[:2] == "on"]
    assert "url(" not in raw
    assert "@import" not in raw
    assert EVIL in page.text
    assert "settings.lr" in page.text
    assert {"svg", "polyline"} <= set(page.tags)


MOVED = {
    "model.layers.0.attn.q.weight": 0.25,
    "model.layers.1.mlp.experts.1.w": 1e-4,
    EVIL: 0.125,
    "elsewhere": 9.0,
}


def test_a_second_map_shows_how_far_elements_moved(run: Run, tmp_path: Path) -> None:
    page = Reader(page_of(run, tmp_path, {"mean_change": MOVED}))
    titles = [value for name, value in page.attributes if name == "title"]
    assert len(titles) == 8
    assert titles[4] == "model.layers.0.attn.q.weight: mean |change| 0.25 of 50 changed"
    assert str(titles[6]).endswith("experts.2.w: unchanged")
    assert str(titles[7]).endswith("experts.2.w: mean |change| 0.0001 of 6 changed")
    strengths = [value for name, value in page.attributes if name == "style"]
    assert strengths == [
        "--s:1.000",
        "--s:0.200",
        "--s:1.000",
        "--s:0.020",
    ]  # square roots of ratios
    assert {"How much it changes the values", "0.25", "0.0001", "0.12"} <= set(page.text)
    assert not [text for text in page.text if text.startswith("mean_change")]


def test_changes_that_are_not_recorded_are_shown_as_unknown(run: Run, tmp_path: Path) -> None:
    some = {"model.layers.0.attn.q.weight": 0.25}
    page = Reader(page_of(run, tmp_path, {"mean_change": some}))
    titles = [value for name, value in page.attributes if name == "title"]
    assert str(titles[7]).endswith("experts.2.w: not recorded")
    assert page.text.count("?") == 2  # that cell, and the tensor outside the layers


@pytest.mark.parametrize(
    "recorded",
    [None, 1, [0.1], {EVIL: "x"}, {EVIL: True}, {EVIL: -1.0}, {EVIL: [1]}, {EVIL: 1e300}, {}],
)
def test_a_malformed_record_of_changes_is_ignored(
    run: Run, tmp_path: Path, recorded: object
) -> None:
    assert mean_changes({"mean_change": recorded}) == {}
    assert "How far" not in page_of(run, tmp_path, {"mean_change": recorded})


def test_cells_weigh_their_tensors_by_what_changed(tmp_path: Path) -> None:
    info = {"mean_change": {**MOVED, "model.layers.1.mlp.experts.0.w": 5.0}}
    found = sparsedelta.inspect(make_delta(tmp_path, info))
    (grid,) = found.layers
    assert grid.cells[0, "attn.q.weight"].mean_change == 0.25
    assert grid.cells[1, "mlp.experts.*.w"].mean_change == pytest.approx(1e-4)  # 0.w is unchanged
    assert grid.cells[1, "attn.q.weight"].mean_change is None


@pytest.mark.parametrize(
    "losses", [None, "12", [[1, "x"]], [[1, 2, 3]], [1, 2], [[1, True]], [[1, 1e300]], {"a": 1}]
)
def test_malformed_losses_are_not_drawn(run: Run, tmp_path: Path, losses: object) -> None:
    assert curve_points({"losses": losses}) == []
    assert "<svg" not in page_of(run, tmp_path, {"losses": losses})


def test_the_curve_is_drawn_to_scale(run: Run, tmp_path: Path) -> None:
    page = page_of(run, tmp_path, {"losses": [[10, 4.0], [20, 2.0], [30, 0.0]]})
    (path,) = re.findall(r'points="([^"]*)"', page)
    points = [tuple(map(float, pair.split(","))) for pair in path.split()]
    assert points == [(56.0, 12.0), (382.0, 109.0), (708.0, 206.0)]


def test_a_page_replaces_a_file_only_with_overwrite(run: Run, workplace: Workplace) -> None:
    html = workplace.path / "page.html"
    html.write_text("mine")
    result = run("inspect", workplace.save_delta(), "--html", html)
    assert result.exit_code == 1
    assert html.read_text() == "mine"
    result = run("inspect", workplace.delta, "--html", html, "--overwrite")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"wrote {html}\n")
    both = run("inspect", workplace.delta, "--html", html, "--overwrite", "--tensors")
    assert both.stdout == run("inspect", workplace.delta, "--tensors").stdout != ""
    both = run("inspect", workplace.delta, "--html", html, "--overwrite", "--json")
    assert both.stdout == run("inspect", workplace.delta, "--json").stdout
    assert html.read_text().startswith("<!doctype html>")


def test_layers_and_single_tensors_are_separated() -> None:
    class Row:
        def __init__(self, name: str, nnz: int, numel: int) -> None:
            self.name, self.nnz, self.numel = name, nnz, numel

    rows = [
        Row("enc.layer.10.a", 1, 4),
        Row("enc.layer.2.a", 2, 4),
        Row("dec.3.b.7.c", 3, 8),
        Row("head", 0, 2),
        Row("blocks.0", 0, 0),
    ]
    grids, single = by_layer(rows)
    assert [(g.stack, g.layers, g.kinds) for g in grids] == [
        ("enc.layer", (2, 10), ("a",)),
        ("dec", (3,), ("b.*.c",)),
        ("blocks", (0,), ("(itself)",)),
    ]
    assert grids[0].cells[2, "a"].density == 0.5
    assert grids[2].cells[0, "(itself)"].density == 0.0
    assert [cell.names for cell in single] == [("head",)]


def heading_order(page: str) -> list[str]:
    return re.findall("<h2>([^<]*)</h2>", page)[:2]


@pytest.mark.parametrize("shares", ["even", "uneven"])
def test_where_the_rate_is_uniform_the_size_of_changes_comes_first(
    run: Run, tmp_path: Path, shares: str
) -> None:
    tensors = {f"h.{layer}.w": noise("F32", 20, 10) for layer in range(40)}
    steps = [4 + (layer if shares == "uneven" else layer % 2) for layer in range(40)]
    after = {
        name: tensor.changed(*range(0, 800, 4 * step))
        for (name, tensor), step in zip(tensors.items(), steps, strict=True)
    }
    write_file(tmp_path / "base.safetensors", tensors)
    write_file(tmp_path / "target.safetensors", after)
    info: dict[str, Any] = {"mean_change": dict.fromkeys(tensors, 0.001)}
    with sparsedelta.diff(
        tmp_path / "base.safetensors", tmp_path / "target.safetensors", info=info
    ) as delta:
        delta.save(tmp_path / "delta.sd")
    assert run("inspect", tmp_path / "delta.sd", "--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    headings = ["Where it changes the model", "How much it changes the values"]
    assert heading_order(page) == (headings[::-1] if shares == "even" else headings)
    # The values of the second map are equal: it says so instead of showing one colour at full depth.
    assert "About the same everywhere: 0.001." in page
    assert ("About the same everywhere: 20.0 % to 25.0 %." in page) == (shares == "even")
    assert page.count('value="small" checked') == 2  # 40 layers: an overview first


def test_the_scores_before_and_after_are_in_a_table(run: Run, tmp_path: Path) -> None:
    evaluations = [
        {"step": 0, "values": {EVIL: 0.25, "only": 1}},
        {"step": 5, "values": {EVIL: 9.0}},
        {"step": 10, "values": {EVIL: 0.5}},
    ]
    page = Reader(page_of(run, tmp_path, {"evaluations": evaluations}))
    at = page.text.index("Evaluation")
    cells = [text for text in page.text[at + 1 :] if text.strip()][:8]
    assert cells == ["score", "base", "step 10", "difference", EVIL, "0.25", "0.5", "+0.25"]
    assert "only" not in page.text


@pytest.mark.parametrize(
    "evaluations",
    [None, {}, "ab", [], [1, 2], [{"step": 1, "values": {"a": 1}}], [{"step": 1}, {"step": 2}],
     [{"step": "0", "values": {"a": 1}}, {"step": 2, "values": {"a": 1}}],
     [{"step": 0, "values": {"a": True}}, {"step": 2, "values": {"a": 1}}],
     [{"step": 2, "values": {"a": 1}}, {"step": 2, "values": {"a": 1}}]],
)  # fmt: skip
def test_other_records_of_scores_are_ignored(evaluations: object) -> None:
    assert recorded_scores({"evaluations": evaluations}) is None
