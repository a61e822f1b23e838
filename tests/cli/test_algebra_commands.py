"""``sparsedelta stack``, ``invert`` and ``merge``: the deltas they write, the output and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.cli_helpers import Run, Workplace
from helpers import assert_same_files, noise, small_chunks, state, tree, write_file

import sparsedelta
from sparsedelta.cli import COMMANDS


@pytest.fixture
def undo(workplace: Workplace, run: Run) -> Path:
    workplace.save_delta()
    output = workplace.path / "undo.sd"
    result = run(
        "invert",
        workplace.delta,
        "--base",
        workplace.base,
        "-o",
        output,
        "--base-id",
        "org/x@4f1e2d9",
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert "27 of" not in result.stdout  # elements that only the target has are not counted
    return output


def test_the_inverse_gives_the_base_back(workplace: Workplace, undo: Path) -> None:
    sparsedelta.apply(workplace.target, undo, workplace.out)
    assert_same_files(workplace.base, workplace.out)
    with sparsedelta.load(undo) as inverse:
        assert inverse.base.id == "org/x@4f1e2d9"


def test_a_delta_stacked_with_its_inverse_changes_nothing(
    workplace: Workplace, undo: Path, run: Run
) -> None:
    output = workplace.path / "nothing.sd"
    result = run("stack", workplace.delta, undo, "--base", workplace.base, "-o", output, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["delta"] == str(output)
    assert (found["nnz"], found["file_bytes"]) == (0, output.stat().st_size)
    assert found["base_fingerprint"] == found["target_fingerprint"]
    sparsedelta.apply(workplace.base, output, workplace.out)
    assert_same_files(workplace.base, workplace.out)


def test_the_report_on_a_stack(workplace: Workplace, undo: Path, run: Run) -> None:
    output = workplace.path / "twice.sd"
    result = run("stack", workplace.delta, undo, workplace.delta, "-o", output)
    assert result.stdout == (
        f"{output}: {output.stat().st_size / 1000:.2f} kB, 27 of 30,669 elements changed (0.088 %),"
        " in 3 of 4 tensors\n"
    )


def test_siblings_that_change_one_tensor_need_the_base(tmp_path: Path, run: Run) -> None:
    raw = noise("F32", 8)
    base = write_file(tmp_path / "b.safetensors", {"w": raw})
    paths = []
    for position in (0, 4):
        target = write_file(tmp_path / f"{position}.safetensors", {"w": raw.changed(position)})
        paths.append(tmp_path / f"{position}.sd")
        with sparsedelta.diff(base, target) as delta:
            delta.save(paths[-1])
    output = tmp_path / "both.sd"
    result = run("stack", *paths, "-o", output)
    assert result.exit_code == 1
    assert (
        "change tensor 'w', so its digest can be computed only with the base; give the base (base=, --base)"
        in result.stderr
    )
    assert not output.exists()
    result = run("stack", *paths, "--base", base, "-o", output)
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)
    assert run("apply", base, output, tmp_path / "out").exit_code == 0
    both = write_file(tmp_path / "both.safetensors", {"w": raw.changed(0, 4)})
    assert (tmp_path / "out").read_bytes() == both.read_bytes()


def test_a_stack_without_target_digests_is_reported(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_chunks(monkeypatch, 2, 1 << 10)
    raw = noise("F32", 8)
    base = write_file(tmp_path / "b.safetensors", {"w": raw})
    paths = []
    for position in (0, 16):
        target = write_file(tmp_path / f"{position}.safetensors", {"w": raw.changed(position)})
        paths.append(tmp_path / f"{position}.sd")
        with sparsedelta.diff(base, target) as delta:
            delta.save(paths[-1])
    result = run("stack", *paths, "-o", tmp_path / "unknown.sd")
    assert result.stdout.splitlines()[1:] == [
        "the delta has digests of the touched values only; with --base it has those of the whole target"
    ]
    with_base = run("stack", *paths, "--base", base, "-o", tmp_path / "known.sd")
    assert len(with_base.stdout.splitlines()) == 1


def test_the_error_if_the_base_is_needed(workplace: Workplace, run: Run) -> None:
    workplace.save_delta()
    result = run("invert", workplace.delta, "-o", workplace.path / "undo.sd")
    assert result.exit_code == 1
    assert "give the base (base=, --base)" in result.stderr
    assert not (workplace.path / "undo.sd").exists()


def test_stack_and_invert_do_not_replace_their_inputs(
    workplace: Workplace, undo: Path, run: Run
) -> None:
    before = {**state(workplace.delta), **state(undo)}
    for arguments in (
        ["stack", workplace.delta, undo, "-o", undo, "--overwrite"],
        ["invert", undo, "-o", undo, "--overwrite"],
        ["stack", workplace.delta, undo, "-o", workplace.delta],
    ):
        assert run(*arguments).exit_code == 1
    assert {**state(workplace.delta), **state(undo)} == before


@pytest.fixture
def variants(workplace: Workplace, tmp_path: Path) -> list[Path]:
    """Return two deltas of the base that change single elements of a tensor."""
    raw = noise("F32", 8)
    base = write_file(tmp_path / "in-place" / "b.safetensors", {"w": raw})
    paths = []
    for number, positions in enumerate(([0, 4], [4, 8])):
        target = write_file(tmp_path / f"{number}.safetensors", {"w": raw.changed(*positions)})
        paths.append(tmp_path / f"{number}.sd")
        with sparsedelta.diff(base, target) as delta:
            delta.save(paths[-1])
    return [base, *paths]


def test_merge_passes_all_options_on(variants: list[Path], tmp_path: Path, run: Run) -> None:
    output = tmp_path / "merged.sd"
    options = ["--method", "dare-ties", "--weights", "0.7,0.3", "--density", "0.9,0.8"]
    result = run(
        "merge", *variants, "-o", output, *options, "--seed", "5", "--scale", "0.5", "--normalize"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    with (
        sparsedelta.load(output) as found,
        sparsedelta.merge(
            variants[0],
            *variants[1:],
            method="dare-ties",
            weights=[0.7, 0.3],
            density=[0.9, 0.8],
            seed=5,
            scale=0.5,
            normalize=True,
        ) as wanted,
    ):
        assert found.info == wanted.info
        assert found.tensors == wanted.tensors


def test_the_error_for_overlapping_siblings_names_merge(
    variants: list[Path], tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "both.sd"
    result = run("stack", *variants[1:], "-o", output)
    assert result.exit_code == 1
    assert "1 positions in common" in result.stderr
    assert "sparsedelta merge" in result.stderr
    assert run("merge", *variants, "-o", output).exit_code == 0


@pytest.mark.parametrize("weights", ["a", "1,,2", ""])
def test_an_option_that_is_not_a_number(
    variants: list[Path], tmp_path: Path, run: Run, weights: str
) -> None:
    result = run("merge", *variants, "-o", tmp_path / "m.sd", "--weights", weights)
    assert result.exit_code == 2
    assert "is not a number" in result.stderr


def test_a_delta_in_place_of_a_checkpoint(workplace: Workplace, run: Run) -> None:
    delta, output = workplace.save_delta(), workplace.path / "output.sd"
    for words in (
        ("diff", delta, workplace.target, "-o", output),
        ("diff", workplace.base, delta, "-o", output),
        ("invert", delta, "--base", delta, "-o", output),
        ("verify", delta, "--base", delta),
    ):
        result = run(*words)
        assert result.exit_code == 1
        assert f"'{delta}' is a delta, not a checkpoint" in result.stderr
        assert not output.exists()


def test_a_merge_without_its_base(workplace: Workplace, run: Run) -> None:
    delta = workplace.save_delta()
    result = run("merge", delta, delta, "-o", workplace.path / "output.sd")
    assert result.exit_code == 2
    assert (
        "is a delta, but the first argument is the base of the deltas: sparsedelta merge BASE DELTA... -o OUT"
        in " ".join(result.stderr.split())
    )


def test_siblings_are_not_applied_one_after_the_other(tmp_path: Path, run: Run) -> None:
    tensor = noise("F32", 300)
    base = write_file(tmp_path / "base.safetensors", {"w": tensor})
    deltas = []
    for number in (0, 4):
        target = write_file(tmp_path / f"{number}.safetensors", {"w": tensor.changed(number)})
        deltas.append(tmp_path / f"{number}.sd")
        sparsedelta.diff(base, target).save(deltas[-1])
    result = run("apply", base, *deltas, tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert "both were made from the same base: combine them with stack or merge" in result.stderr
    both = tmp_path / "both.sd"
    assert run("stack", *deltas, "--base", base, "-o", both).exit_code == 0
    assert run("apply", base, both, tmp_path / "out.safetensors").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        "diff base target -o new/",
        "stack delta.sd -o new/",
        "invert delta.sd --base base -o new/",
        "merge base delta.sd -o new/",
        "convert target new/ --base base --to sd",
        "convert delta.sd new/ --base base --to mask --lossy",
    ],
)
def test_no_delta_is_written_under_the_name_of_a_folder(
    workplace: Workplace, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    workplace.save_delta()
    monkeypatch.chdir(workplace.path)
    before = tree(workplace.path)
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: output 'new/' is written like a folder, but the output is one file; give the name of a"
        " file, such as 'new/delta.sd'\n"
    )
    assert tree(workplace.path) == before


def test_numbers_that_are_not_separated_by_commas(
    workplace: Workplace, run: Run, tmp_path: Path
) -> None:
    delta = workplace.save_delta()
    result = run("merge", workplace.base, delta, delta, "--weights", "0.7", "0.3", "-o", "m.sd")
    assert result.exit_code == 2
    assert (
        "'0.3' is not the path of a delta; separate numbers by commas, as in --weights 0.7,0.3"
        in " ".join(result.stderr.split())
    )


def test_the_error_about_deltas_of_other_dtypes_names_both(tmp_path: Path, run: Run) -> None:
    paths: list[Path] = []
    for dtype in ("F32", "BF16"):
        raw, v = noise(dtype, 8), noise("F32", 4).changed(len(paths))
        base = write_file(tmp_path / f"{dtype}.safetensors", {"v": v, "w": raw})
        target = {"v": v, "w": raw.changed(0)}
        with sparsedelta.diff(base, write_file(tmp_path / "t.safetensors", target)) as delta:
            paths.append(tmp_path / f"{dtype}.sd")
            delta.save(paths[-1])
    for one, other, says in (
        (
            paths[0],
            paths[1],
            "tensor 'w' is F32 in the target of delta 1 and BF16 in the base of delta 2",
        ),
        (
            paths[1],
            paths[0],
            "tensor 'w' is BF16 in the target of delta 1 and F32 in the base of delta 2",
        ),
    ):
        result = run("stack", one, other, "-o", tmp_path / "both.sd")
        assert (result.exit_code, says in result.stderr) == (1, True), result.stderr


def test_deltas_that_retype_a_tensor_have_an_order_and_siblings_name_the_dtypes(
    tmp_path: Path, run: Run
) -> None:
    w, v = noise("F32", 8), noise("F32", 4)
    contents = (
        {"w": w, "v": v},
        {"w": w.changed(4), "v": v.changed(0)},
        {"w": noise("BF16", 8), "v": v.changed(0, 4)},
    )
    files = [write_file(tmp_path / f"{n}.safetensors", one) for n, one in enumerate(contents)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        with sparsedelta.diff(files[one], files[other]) as delta:
            delta.save(tmp_path / f"{one}{other}.sd")
    result = run("stack", tmp_path / "12.sd", tmp_path / "01.sd", "-o", tmp_path / "both.sd")
    assert "they are a chain in the order 2, 1" in result.stderr
    result = run("stack", tmp_path / "02.sd", tmp_path / "01.sd", "-o", tmp_path / "both.sd")
    assert "retypes or reshapes tensor 'w' (BF16), and delta 2 changes its elements (F32);" in (
        result.stderr
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "merge a.sd b.sd --base base/ -o out.sd",
            "no such option '--base'; give BASE as an argument, in this order: sparsedelta merge base/ sql.sd chat.sd -o",
        ),
        (
            "apply base/ a.sd -o out",
            "give OUT as an argument, in this order: sparsedelta apply base/",
        ),
        (
            "stack --delta a.sd -o out.sd",
            "give DELTA as an argument, in this order: sparsedelta stack",
        ),
        ("stack a.sd --bass base/", "No such option '--bass'. Did you mean '--base'?"),
        ("stack a.sd", "Missing option '-o' / '--output'. Example: sparsedelta stack monday.sd"),
        ("apply base/", "in this order. Example: sparsedelta apply base/ delta.sd out/"),
        (
            "merge -o out.sd",
            "or --config. Example: sparsedelta merge base/ sql.sd chat.sd -o both.sd",
        ),
    ],
)
def test_usage_errors_show_how_the_command_is_called(line: str, says: str, run: Run) -> None:
    result = run(*line.split())
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_argument_is_reported_with_an_example(name: str, run: Run) -> None:
    result = run(name)
    if "Missing argument" in result.stderr:
        assert f". Example: sparsedelta {name} " in result.stderr
    else:
        assert name in ("apply", "merge", "explain", "doctor", "completion"), result.stderr
