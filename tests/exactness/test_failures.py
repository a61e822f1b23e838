"""On any failure there is no output, or a complete one, and the error says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from helpers import (
    Raw,
    Tensors,
    assert_same_files,
    noise,
    state,
    tree,
    write,
    write_file,
    write_sharded,
)
from safetensors.numpy import save_file

import sparsedelta
from sparsedelta.errors import (
    AlreadyApplied,
    BaseMismatch,
    CheckpointError,
    Corrupt,
    PartlyApplied,
    SparseDeltaError,
    StructureMismatch,
    TargetMismatch,
)
from sparsedelta.ops import base_check, diff

W = noise("BF16", 400, 3)
V = noise("F32", 70)
U = noise("I64", 2, 2)
BASE = {"w": W, "v": V, "u": U}
TARGET = {"w": W.changed(0, 100, 239), "v": V, "u": U.changed(8)}


def folder(path: Path, tensors: Tensors, **side_files: str) -> Path:
    items = list(tensors.items())
    write_sharded(path, [dict(items[:1]), dict(items[1:])])
    for name, content in side_files.items():
        write(path / f"{name}.json", content)
    return path


class Case:
    """A base, a target, their delta, and a folder in which an output would be seen."""

    def __init__(self, root: Path) -> None:
        self.base = folder(root / "base", BASE, config="1", same="same")
        self.target = folder(root / "target", TARGET, config="2", same="same")
        self.delta = root / "delta.sd"
        with sparsedelta.diff(self.base, self.target, base_id="org/model@4f1e") as delta:
            delta.save(self.delta)
        self.place = root / "place"
        self.place.mkdir()
        self.out = self.place / "out"

    def refused(
        self,
        error: type[Exception],
        problem: str,
        base: Path,
        *,
        verify: str = "full",
    ) -> Exception:
        """Check that the delta cannot be applied to a base, and that nothing is left behind."""
        before, n_open = state(base), len(os.listdir("/dev/fd"))
        with pytest.raises(error, match=problem) as caught:
            sparsedelta.apply(base, self.delta, self.out, verify=verify)  # type: ignore[arg-type]
        assert os.listdir(self.place) == []
        assert state(base) == before
        assert len(os.listdir("/dev/fd")) == n_open
        return caught.value


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize(
    ("name", "position"), [("w", 0), ("w", 1), ("w", 700), ("v", 9), ("u", 31), ("u", 8)]
)
def test_wrong_base(name: str, position: int, case: Case, tmp_path: Path) -> None:
    other = BASE | {name: BASE[name].changed(position)}
    if name == "u" and position == 8:  # the one touched element is the target's, but w is not
        other["w"] = BASE["w"].changed(55)
        name = "[uw]"  # both are wrong, and two workers compare them at the same time
    wrong = folder(tmp_path / "wrong", other, config="1", same="same")
    error = case.refused(
        BaseMismatch, rf"tensor '{name}' has digest .*expected .*org/model@4f1e", wrong
    )
    assert isinstance(error, BaseMismatch)
    assert error.tensor is not None
    assert re.fullmatch(name, error.tensor)
    assert error.expected != error.found


def test_how_much_of_a_wrong_base_differs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = folder(tmp_path / "damaged", BASE | {"v": V.changed(9)}, config="1", same="same")
    case.refused(BaseMismatch, "4f1e: 1 of 3 tensors differs, perhaps in a damaged copy", damaged)
    both = {"u": U.changed(9), "w": W.changed(9)}
    other = folder(tmp_path / "other", BASE | both, config="1", same="same")
    case.refused(
        BaseMismatch, "4f1e: 2 of 3 tensors differ, as in another revision or fine-tune", other
    )
    limit = len(W.data) + len(U.data)  # every second tensor: w and u
    monkeypatch.setattr(base_check, "_COMPARED_BYTES", limit)
    case.refused(BaseMismatch, "4f1e: 2 of 2 tensors that were compared differ, as in", other)
    monkeypatch.setattr(base_check, "_COMPARED_BYTES", 1)
    case.refused(BaseMismatch, "made from, org/model@4f1e$", other)


def test_wrong_base_touched_values(case: Case, tmp_path: Path) -> None:
    wrong = folder(tmp_path / "wrong", BASE | {"u": U.changed(9)}, config="1", same="same")
    case.refused(BaseMismatch, "tensor 'u' has digest", wrong, verify="touched")
    case.refused(AlreadyApplied, "already", case.target, verify="touched")


@pytest.mark.parametrize("change", ["missing", "retyped", "reshaped", "renamed"])
def test_what_the_base_lacks_is_named(change: str, case: Case, tmp_path: Path) -> None:
    changes: dict[str, tuple[str, Callable[[dict[str, Raw]], object]]] = {
        "missing": ("v", lambda t: t.pop("v")),
        "retyped": ("w", lambda t: t.update(w=Raw("F16", W.shape, W.data))),
        "reshaped": ("w", lambda t: t.update(w=Raw("BF16", (3, 400), W.data))),
        "renamed": ("v", lambda t: t.update(x=t.pop("v"))),
    }
    name, alter = changes[change]
    other = dict(BASE)
    alter(other)
    wrong = folder(tmp_path / "wrong", other, config="1", same="same")
    error = case.refused(StructureMismatch, f"tensor '{name}'.*expected", wrong)
    assert isinstance(error, StructureMismatch)
    assert error.tensor == name


def test_another_model_is_called_so_before_its_side_files(case: Case, tmp_path: Path) -> None:
    other = {name: Raw(raw.dtype, (*raw.shape, 1), raw.data) for name, raw in BASE.items()}
    wrong = folder(tmp_path / "wrong", other, config="3", same="other")
    reason = r"is another model than the base .*org/model@4f1e: 3 of 3 tensors .*\[400, 3, 1\], expected BF16 \[400, 3\]"
    case.refused(StructureMismatch, reason, wrong)
    with pytest.raises(StructureMismatch, match=reason):
        sparsedelta.verify(case.delta, base=wrong)
    with pytest.raises(StructureMismatch, match=reason):
        sparsedelta.invert(case.delta, base=wrong)
    with pytest.raises(StructureMismatch, match=reason):
        sparsedelta.stack(case.delta, base=wrong)
    with pytest.raises(StructureMismatch, match=reason):
        sparsedelta.merge(wrong, case.delta)


def test_what_the_target_is_not_made_from_may_be_anything(case: Case, tmp_path: Path) -> None:
    other = folder(tmp_path / "other", BASE, config="3", same="same")
    write_file(other / "more.safetensors", {"w": V, "more": U})
    write(other / "README.md", "x")
    sparsedelta.apply(other, case.delta, case.out)
    assert_same_files(case.target, case.out)


def test_a_delta_that_only_adds_makes_its_target_of_its_target(tmp_path: Path) -> None:
    case = Case(tmp_path)
    grown = folder(tmp_path / "grown", BASE | {"new": V}, config="1", same="same")
    with sparsedelta.diff(case.base, grown) as delta:
        delta.save(case.delta, overwrite=True)
    sparsedelta.apply(grown, case.delta, case.out)
    assert_same_files(grown, case.out)


def test_the_target_without_an_untouched_tensor_is_called_applied(
    case: Case, tmp_path: Path
) -> None:
    """That there is nothing to be done says more than what is missing."""
    less = {name: TARGET[name] for name in "wu"}
    case.refused(AlreadyApplied, "already", folder(tmp_path / "less", less))
    case.refused(AlreadyApplied, "already", write_file(tmp_path / "file", TARGET))
    moved = write_sharded(tmp_path / "moved", [{name: TARGET[name] for name in "wvu"}])
    # In other files it is not the target.
    case.refused(BaseMismatch, "has no file 'same.json'", moved)


def test_untouched_base_is_not_called_the_target(case: Case, tmp_path: Path) -> None:
    less = folder(tmp_path / "less", {name: BASE[name] for name in "wu"}, config="1", same="same")
    case.refused(StructureMismatch, "tensor 'v' in .* is absent", less)


def test_already_applied(case: Case) -> None:
    case.refused(AlreadyApplied, "already is this delta's target", case.target)


@pytest.mark.parametrize("name", ["w", "u"])
def test_partly_applied(name: str, case: Case, tmp_path: Path) -> None:
    partly = folder(tmp_path / "partly", BASE | {name: TARGET[name]}, config="1", same="same")
    error = case.refused(PartlyApplied, "1 of 2 changed tensors of this delta's target", partly)
    assert isinstance(error, PartlyApplied)
    assert error.tensor == name


@pytest.mark.parametrize("values", ["ulp", "target"])
def test_already_applied_whatever_the_values(values: str, tmp_path: Path) -> None:
    base = write_file(tmp_path / "base", BASE)
    target = write_file(tmp_path / "target", {"w": TARGET["w"], "u": U})
    delta = sparsedelta.diff(base, target, values=values)
    with delta, pytest.raises(AlreadyApplied):
        sparsedelta.apply(target, delta, tmp_path / "out")
    target = write_file(tmp_path / "target", TARGET)
    with sparsedelta.diff(base, target, values=values) as delta, pytest.raises(AlreadyApplied):
        sparsedelta.apply(target, delta, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "target"]


@pytest.mark.parametrize("content", ["other", "sam", None])
def test_wrong_side_file(content: str | None, case: Case, tmp_path: Path) -> None:
    wrong = folder(tmp_path / "wrong", BASE, config="1")
    if content is not None:
        write(wrong / "same.json", content)
    case.refused(BaseMismatch, r"same\.json", wrong)
    case.refused(BaseMismatch, r"same\.json", wrong, verify="none")


def test_further_side_files_of_the_base_do_no_harm(case: Case) -> None:
    write(case.base / "README.md", "x")
    write(case.base / "config.json", "other: the delta carries the target's")
    (case.base / "odd").symlink_to("nothing")
    sparsedelta.apply(case.base, case.delta, case.out)
    assert_same_files(case.target, case.out)


@pytest.mark.parametrize("verify", ["full", "touched", "none"])
def test_every_verify_is_exact_on_the_right_base(verify: str, case: Case) -> None:
    sparsedelta.apply(case.base, case.delta, case.out, verify=verify)  # type: ignore[arg-type]
    assert_same_files(case.target, case.out)


def test_unknown_verify(case: Case) -> None:
    case.refused(ValueError, "verify is 'some', expected one of", case.base, verify="some")


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link", "base", "inside base"])
def test_existing_or_overlapping_output(kind: str, case: Case) -> None:
    if kind == "file":
        write(case.out, "x")
    elif kind == "folder":
        case.out.mkdir()
    elif kind == "dangling link":
        case.out.symlink_to("nothing")
    out = {"base": case.base, "inside base": case.base / "out"}.get(kind, case.out)
    before = state(case.place), state(case.base)
    with pytest.raises((FileExistsError, ValueError), match="choose another"):
        sparsedelta.apply(case.base, case.delta, out)
    if "base" in kind:
        with pytest.raises(ValueError, match=r"is also an input|one contains the other"):
            sparsedelta.apply(case.base, case.delta, out, overwrite=True)
    assert (state(case.place), state(case.base)) == before


def test_overwriting(case: Case) -> None:
    write(case.out / "old/model.safetensors", "x")
    sparsedelta.apply(case.base, case.delta, case.out, overwrite=True)
    assert_same_files(case.target, case.out)
    assert os.listdir(case.place) == ["out"]


def test_a_link_to_a_folder_is_not_overwritten(case: Case) -> None:
    other = write(case.place / "disk" / "model.safetensors", "x").parent
    case.out.symlink_to(other)
    with pytest.raises(
        NotADirectoryError, match=r"is a link to a folder, .* give that folder, '.*disk'"
    ):
        sparsedelta.apply(case.base, case.delta, case.out, overwrite=True)
    assert case.out.is_symlink()


def test_failing_to_overwrite_keeps_what_was_there(case: Case) -> None:
    write(case.out / "old/model.safetensors", "x")
    before = state(case.out)
    with pytest.raises(AlreadyApplied):
        sparsedelta.apply(case.target, case.delta, case.out, overwrite=True)
    assert state(case.out) == before
    assert os.listdir(case.place) == ["out"]


@pytest.mark.parametrize("where", [0.01, 0.5, 0.9, 1])
def test_damaged_delta(where: float, case: Case) -> None:
    raw = bytearray(case.delta.read_bytes())
    raw[round(where * (len(raw) - 1))] ^= 0x40
    case.delta.write_bytes(raw)
    case.refused(SparseDeltaError, r"damaged|digest|delta|manifest", case.base)


def test_cut_delta(case: Case) -> None:
    case.delta.write_bytes(case.delta.read_bytes()[:-1])
    case.refused(SparseDeltaError, "ends early", case.base)


def test_full_disk(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    case.refused(OSError, "No space left", case.base)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_several_deltas(n: int, tmp_path: Path) -> None:
    steps = [folder(tmp_path / "0", BASE, config="0")]
    deltas = []
    for i in range(1, n + 1):
        tensors = {"w": W.changed(*range(i)), "v": V, f"new{i}": V.changed(i)}
        steps.append(folder(tmp_path / str(i), tensors, config=str(i)))
        deltas.append(tmp_path / f"{i}.sd")
        with sparsedelta.diff(steps[i - 1], steps[i]) as delta:
            delta.save(deltas[-1])
    place = tmp_path / "place"
    place.mkdir()
    if n == 0:
        with pytest.raises(ValueError, match="no delta"):
            sparsedelta.apply(steps[0], deltas, place / "out")
        return
    sparsedelta.apply(steps[0], deltas, place / "out")
    assert_same_files(steps[n], place / "out")
    assert os.listdir(place) == ["out"]
    if n > 1:
        with pytest.raises(BaseMismatch, match="order in which"):
            sparsedelta.apply(steps[0], deltas[::-1], place / "out2")
        with pytest.raises((BaseMismatch, StructureMismatch)):
            sparsedelta.apply(steps[0], deltas[1:], place / "out2")
        assert os.listdir(place) == ["out"]


def test_verify_tells_base_and_target(case: Case, tmp_path: Path) -> None:
    before = state(case.base), state(case.target)
    report = sparsedelta.verify(case.delta)
    assert (report.n_tensors, report.n_changed, report.nnz) == (3, 2, 4)
    assert (report.base_checked, report.target_checked) == (False, False)
    report = sparsedelta.verify(case.delta, base=case.base, target=case.target)
    assert (report.base_checked, report.target_checked) == (True, True)
    with pytest.raises(AlreadyApplied, match=r"not its base; check it as the target \(target="):
        sparsedelta.verify(case.delta, base=case.target)
    for base in (case.base, folder(tmp_path / "one", BASE)):  # its other files do not matter
        with pytest.raises(TargetMismatch, match=r"base, not of its target; .* \(base=, --base\)"):
            sparsedelta.verify(case.delta, target=base)
    other = folder(tmp_path / "other", BASE | {"v": V.changed(9)}, config="2", same="same")
    with pytest.raises(TargetMismatch, match="is not the delta's target"):
        sparsedelta.verify(case.delta, target=other)
    assert (state(case.base), state(case.target)) == before


@pytest.mark.parametrize("change", ["tensor", "side", "further", "missing", "header", "folder"])
def test_verify_finds_every_difference_of_a_target(change: str, case: Case, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(case.target, other)
    sparsedelta.verify(case.delta, target=other)
    if change == "tensor":
        folder(other, TARGET | {"v": V.changed(5)})
    elif change == "side":
        write(other / "config.json", "3")
    elif change == "further":
        write(other / "more.json", "")
    elif change == "missing":
        (other / "same.json").unlink()
    elif change == "header":
        write_file(other / "model-00001-of-00002.safetensors", {"w": TARGET["w"]})
    else:
        (other / "empty").mkdir()
    with pytest.raises(TargetMismatch):
        sparsedelta.verify(case.delta, target=other)


def test_verify_single_file_by_any_name(tmp_path: Path) -> None:
    base, target = write_file(tmp_path / "a", BASE), write_file(tmp_path / "b", TARGET)
    with sparsedelta.diff(base, target) as delta:
        shutil.copy(target, tmp_path / "c")
        assert sparsedelta.verify(delta, base=base, target=tmp_path / "c").target_checked
        with pytest.raises(TargetMismatch):
            sparsedelta.verify(delta, target=base)
        with pytest.raises(TargetMismatch):
            sparsedelta.verify(delta, target=folder(tmp_path / "d", TARGET))


UNREAD = ["pytorch_model.bin", "sub/model.GGUF", "a.pt", "b.pth", "tf_model.h5", "x.onnx", "o.npz"]


@pytest.mark.parametrize("name", UNREAD)
def test_weights_that_are_not_read_stop_diff(name: str, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", BASE, config="1")
    target = folder(tmp_path / "target", TARGET, config="2")
    write(target / name, "weights")
    with pytest.raises(CheckpointError, match=f"{name}.*weight format.*--exclude {name}"):
        sparsedelta.diff(base, target)
    check_excluded(base, target, name)


def check_excluded(base: Path, target: Path, name: str) -> None:
    """Check that with a file left out, the output is the target without it."""
    with sparsedelta.diff(base, target, exclude=[name]) as delta:
        sparsedelta.apply(base, delta, target.parent / "out")
    wanted, found = tree(target), tree(target.parent / "out")
    del wanted[name]
    assert found == wanted


def test_file_too_large_to_carry_stops_diff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder(tmp_path / "base", BASE, config="1")
    target = folder(tmp_path / "target", TARGET, config="2")
    os.truncate(write(target / "corpus.txt", "x"), diff.CARRY_LIMIT_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"corpus\.txt.*64 MiB.*--exclude corpus.txt"):
        sparsedelta.diff(base, target)
    check_excluded(base, target, "corpus.txt")
    shutil.rmtree(tmp_path / "out")
    limit = 1 << 20
    monkeypatch.setattr(diff, "CARRY_LIMIT_BYTES", limit)
    os.truncate(target / "corpus.txt", limit)
    with sparsedelta.diff(base, target) as delta:
        sparsedelta.apply(base, delta, tmp_path / "out")
    assert_same_files(target, tmp_path / "out")
    shutil.copy(target / "corpus.txt", base / "corpus.txt")
    os.truncate(target / "corpus.txt", limit + 1)
    os.truncate(base / "corpus.txt", limit + 1)
    shutil.rmtree(tmp_path / "out")
    with sparsedelta.diff(base, target) as delta:  # as large as it likes: it is the base's
        sparsedelta.apply(base, delta, tmp_path / "out")
    assert_same_files(target, tmp_path / "out")


def test_hint_for_many_files_is_a_pattern(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    for folder in (base, target):
        write_file(folder / "model.safetensors", {"w": noise("F32", 3)})
    for number in range(12):
        write(target / f"onnx/model_{number}.onnx", "weights")
        write(target / f"pytorch_model-{number:05d}-of-00012.bin", "weights")
    write(target / "onnx/config.json", "{}")
    with pytest.raises(CheckpointError) as found:
        sparsedelta.diff(base, target)
    hint = str(found.value).partition("leave it out (exclude=): ")[2]
    assert hint == "--exclude '*.onnx' --exclude '*.bin'"
    with sparsedelta.diff(base, target, exclude=["*.onnx", "*.bin"]) as delta:
        assert [file.path for file in delta.target.side_files] == ["onnx/config.json"]


def test_all_files_that_the_base_lacks_are_named_at_once(tmp_path: Path) -> None:
    base, target, part = tmp_path / "base", tmp_path / "target", tmp_path / "part"
    for folder in (base, target):
        for name in ("README.md", ".gitattributes", *(f"img/{n}.png" for n in range(9))):
            write(folder / name, "x")
        write(folder / "config.json", "{}")
    for folder in (base, target, part):
        write_file(folder / "model.safetensors", {"w": noise("F32", 3)})
    write(part / "config.json", "{}")
    with sparsedelta.diff(base, target, base_id="org/model@4f1e2d9") as delta:
        with pytest.raises(BaseMismatch) as found:
            sparsedelta.apply(part, delta, tmp_path / "out")
        message = str(found.value)
        assert "has no files '.gitattributes', 'README.md', 'img/0.png'" in message
        assert " and 6 more, which the base" in message
        assert "get them from org/model@4f1e2d9, or rebuild the target without them" in message
        hint = "--exclude .gitattributes --exclude README.md --exclude '*.png'"
        assert message.endswith(f"(exclude=, `sparsedelta apply {hint}`)")
        left_out = [".gitattributes", "README.md", "*.png"]
        sparsedelta.apply(part, delta, tmp_path / "out", exclude=left_out)


def test_all_files_that_stop_diff_are_named(tmp_path: Path) -> None:
    base, target = folder(tmp_path / "base", BASE), folder(tmp_path / "target", TARGET)
    for name in UNREAD[:3]:
        write(target / name, "weights")
    with pytest.raises(CheckpointError) as caught:
        sparsedelta.diff(base, target)
    assert all(f"'{name}'" in str(caught.value) for name in UNREAD[:3])


@pytest.mark.parametrize("name", ["back\\slash", "co:lon.json", "new\nline", b"caf\xe9.json"])
@pytest.mark.parametrize("weights", [False, True])
def test_file_names_that_cannot_be_kept_stop_diff(
    weights: bool, name: str | bytes, tmp_path: Path
) -> None:
    base, target = folder(tmp_path / "base", BASE), folder(tmp_path / "target", TARGET)
    odd = target / os.fsdecode(name)
    if weights:
        odd = odd.with_name(odd.name + ".safetensors")
        write_file(odd, {"x": V})
    else:
        write(odd, "{}")
    with pytest.raises(CheckpointError, match=r"rename it or leave it out \(exclude=, --exclude\)"):
        sparsedelta.diff(base, target)
    write(base / os.fsdecode(name), "in the base it does no harm")
    odd.unlink()
    with sparsedelta.diff(base, target) as delta:
        sparsedelta.apply(base, delta, tmp_path / "out")
    assert_same_files(target, tmp_path / "out")


def test_excluding_files_of_the_base_too(tmp_path: Path) -> None:
    base, target = folder(tmp_path / "base", BASE), folder(tmp_path / "target", TARGET)
    for root in (base, target):
        write_file(root / "consolidated.safetensors", {"w": noise("U8", 9, seed=root.name)})
        write(root / "old.bin", root.name)
    with sparsedelta.diff(base, target, exclude=["consolidated.safetensors", "*.bin"]) as delta:
        assert {row.name for row in delta.tensors} == set(BASE)
        sparsedelta.apply(base, delta, tmp_path / "out")
    (target / "consolidated.safetensors").unlink()
    (target / "old.bin").unlink()
    assert_same_files(target, tmp_path / "out")


def test_a_base_without_safetensors_is_not_called_another_model(case: Case, tmp_path: Path) -> None:
    write(tmp_path / "bin/pytorch_model.bin", "x")
    case.refused(CheckpointError, r"holds no \.safetensors file; .*torch\.load", tmp_path / "bin")


def test_no_weights_stop_diff(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", BASE)
    write(tmp_path / "target/pytorch_model.bin", "x")
    for old, new in ((base, tmp_path / "target"), (tmp_path / "target", base)):
        with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
            sparsedelta.diff(old, new)


def test_target_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = folder(tmp_path / "base", BASE, config="1")
    target = folder(tmp_path / "target", TARGET, config="2")
    monkeypatch.setattr(diff, "digest_file", lambda location: (1, blake3(bytes(location)).digest()))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        sparsedelta.diff(base, target)


def test_base_that_changes_under_a_delta_in_memory(case: Case) -> None:
    with sparsedelta.load(case.delta) as delta:
        raw = bytearray(case.delta.read_bytes())
        raw[-1] ^= 1
        case.delta.write_bytes(raw)
        with pytest.raises(Corrupt, match="a chunk of the delta is damaged"):
            sparsedelta.apply(case.base, delta, case.out)
    assert os.listdir(case.place) == []


def test_the_current_folder_is_no_output(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.place)
    before = state(case.place)
    with pytest.raises(ValueError, match="current folder"):
        sparsedelta.apply(case.base, case.delta, ".", overwrite=True)
    assert state(case.place) == before


def test_an_output_that_holds_the_delta_is_refused(case: Case) -> None:
    case.out.mkdir()
    inside = case.out / "delta.sd"
    shutil.copyfile(case.delta, inside)
    with pytest.raises(ValueError, match="one contains the other"):
        sparsedelta.apply(case.base, inside, case.out, overwrite=True)
    assert inside.read_bytes() == case.delta.read_bytes()


def test_progress_adds_up_to_what_was_announced(case: Case) -> None:
    class Count:
        announced = done = 0

        def start(self, label: str, n_bytes: int) -> None:
            self.announced += n_bytes

        def advance(self, n_bytes: int) -> None:
            self.done += n_bytes

        def finish(self) -> None:
            pass

    count = Count()
    sparsedelta.apply(case.base, case.delta, case.out, progress=count)
    assert count.done == count.announced > 0


@pytest.mark.parametrize("to", ["elsewhere", "blobs"])
def test_a_side_file_that_is_a_link_out_of_the_folder(to: str, tmp_path: Path) -> None:
    weights = {"w": (np.zeros(4, np.float32))}
    base, target = tmp_path / "base", tmp_path / "repo/snapshots/commit"
    for folder in (base, target):
        folder.mkdir(parents=True)
        save_file(weights, folder / "model.safetensors")
    place = {"elsewhere": tmp_path / "secret", "blobs": tmp_path / "repo/blobs/1"}[to]
    write(place, "content")
    (target / "linked.txt").symlink_to(place)
    if to == "blobs":  # as the Hub's cache has it
        sparsedelta.diff(base, target).close()
    else:
        with pytest.raises(
            CheckpointError, match=r"linked\.txt.*link to a file outside.*--exclude"
        ):
            sparsedelta.diff(base, target)
