"""What holds for every form: round trips, refusals, losses, digests, and the verbs that take foreign deltas."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Raw, assert_same_files, noise, write, write_file
from interop.interop_helpers import (
    ADDITIVE,
    EXACT,
    Pair,
    bf16_pair,
    floats,
    pair,
    plain_pair,
    with_bits,
)

import sparsedelta
from sparsedelta.errors import (
    BadMagic,
    BaseNeeded,
    Corrupt,
    LossyConversion,
    SparseDeltaError,
    StructureMismatch,
    TargetMismatch,
)
from sparsedelta.interop.registry import FORMS, NAMES, recognised
from sparsedelta.interop.source import Source

Case = tuple[str, dict[str, str]]


def written(tmp_path: Path, given: Pair, case: Case) -> Path:
    out = tmp_path / "foreign"
    sparsedelta.convert(given.delta, out, base=given.base, write_as=case[0], settings=case[1])
    return out


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_exact_forms_rebuild_every_bit(case: Case, tmp_path: Path) -> None:
    given = bf16_pair(tmp_path)
    foreign = written(tmp_path, given, case)
    form = recognised(Source(foreign))
    assert form is not None
    assert form.name == case[0]
    report = sparsedelta.convert(foreign, tmp_path / "back.sd", base=given.base)
    assert (report.read_as, report.n_changed, report.nnz) == (case[0], 2, 6)
    assert report.verified == form.abilities.proof
    sparsedelta.apply(given.base, tmp_path / "back.sd", tmp_path / "out")
    assert_same_files(given.target, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("case", ADDITIVE, ids=str)
def test_additive_forms_rebuild_small_changes(case: Case, dtype: str, tmp_path: Path) -> None:
    given = plain_pair(tmp_path, dtype)
    foreign = written(tmp_path, given, case)
    sparsedelta.apply(given.base, foreign, tmp_path / "out")
    assert_same_files(given.target, tmp_path / "out")


@pytest.mark.parametrize("case", [*EXACT, *ADDITIVE], ids=str)
def test_verbs_take_foreign_deltas(case: Case, tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    foreign = written(tmp_path, given, case)
    report = sparsedelta.verify(foreign, base=given.base, target=given.target)
    assert report.converted is not None
    assert report.converted["form"] == case[0]
    found = sparsedelta.inspect(foreign, base=given.base)
    assert (found.nnz, found.states["changed"]) == (4, 1)
    for call in (
        lambda: sparsedelta.verify(foreign),
        lambda: sparsedelta.inspect(foreign),
        lambda: sparsedelta.stack(foreign),
    ):
        with pytest.raises(BaseNeeded, match=f"a delta of the form {case[0]}"):
            call()


def test_chain_of_several_forms(tmp_path: Path) -> None:
    w = floats("BF16", 6, 6)
    steps = [w]
    for number in range(1, 4):
        steps.append(with_bits(steps[-1], {number: number, 30 + number: 9}))
    files = [write_file(tmp_path / f"{n}.safetensors", {"w": step}) for n, step in enumerate(steps)]
    deltas = []
    for n, form in enumerate(("slime", "sd", "trl-v1")):
        out = tmp_path / f"delta-{n}"
        sparsedelta.convert(files[n + 1], out, base=files[n], write_as=form)
        deltas.append(out)
    sparsedelta.apply(files[0], deltas, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == files[3].read_bytes()
    with sparsedelta.stack(*deltas, base=files[0]) as stacked:
        sparsedelta.apply(files[0], stacked, tmp_path / "stacked")
    assert (tmp_path / "stacked").read_bytes() == files[3].read_bytes()
    with pytest.raises(SparseDeltaError):  # the digests of slime, against the wrong base
        sparsedelta.apply(files[1], deltas, tmp_path / "wrong")


def test_checkpoints_are_read_and_written(tmp_path: Path) -> None:
    given = bf16_pair(tmp_path)
    sparsedelta.convert(given.target, tmp_path / "a.sd", base=given.base)
    report = sparsedelta.convert(
        tmp_path / "a.sd", tmp_path / "whole", base=given.base, write_as="checkpoint"
    )
    assert (report.read_as, report.written_as) == ("sd", "checkpoint")
    assert_same_files(given.target, tmp_path / "whole")


def test_the_target_proves_what_the_file_does_not(tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    foreign = written(tmp_path, given, ("trl-v2", {}))
    assert sparsedelta.convert(foreign, tmp_path / "a.sd", base=given.base).verified == "none"
    sparsedelta.convert(foreign, tmp_path / "b.sd", base=given.base, target=given.target)
    marks = [sparsedelta.inspect(tmp_path / name).info["converted"] for name in ("a.sd", "b.sd")]
    assert [mark["verified"] for mark in marks if isinstance(mark, dict)] == ["none", "target"]
    # The mark stays when the delta is converted to our form again.
    sparsedelta.convert(tmp_path / "a.sd", tmp_path / "c.sd", base=given.base)
    assert sparsedelta.inspect(tmp_path / "c.sd").info["converted"] == marks[0]
    with pytest.raises(TargetMismatch, match=r"'proj.weight' differs"):
        sparsedelta.convert(foreign, tmp_path / "d.sd", base=given.base, target=given.base)


@pytest.mark.parametrize(
    "case", [c for c in EXACT if FORMS[c[0]].abilities.proof != "none"], ids=str
)
def test_wrong_base_fails_a_digest(case: Case, tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    foreign = written(tmp_path, given, case)
    w = floats("BF16", 12, 10)
    other = {"proj.weight": with_bits(w, {7: 1}), "norm.weight": floats("BF16", 10, seed=3)}
    base = write_file(tmp_path / "other" / "model.safetensors", other)
    with pytest.raises(Corrupt, match="is rebuilt with digest"):
        sparsedelta.convert(foreign, tmp_path / "x.sd", base=base)
    assert not (tmp_path / "x.sd").exists()


@pytest.mark.parametrize("name", sorted(FORMS))
def test_losses_are_refused_and_listed(name: str, tmp_path: Path) -> None:
    if FORMS[name].not_written:
        pytest.skip("the form is not written")
    old = {"proj.weight": floats("BF16", 12, 10), "steps": noise("I64", 3)}
    new = {
        "proj.weight": with_bits(old["proj.weight"], {3: 0x3F80}),
        "steps": old["steps"],
        "new": noise("U8", 4),
    }
    given = pair(tmp_path, old, new)
    write(given.target / "extra.txt", "text")
    out = tmp_path / "out"
    with pytest.raises(LossyConversion, match=r"the added tensor 'new'; the side file 'extra.txt'"):
        sparsedelta.convert(given.target, out, base=given.base, write_as=name)
    assert not out.exists()
    report = sparsedelta.convert(given.target, out, base=given.base, write_as=name, lossy=True)
    assert report.nnz == 1
    assert len(report.losses) >= 2


@pytest.mark.parametrize("name", ["trl-v1", "trl-v2", "grail", "pulsept1", "shira", "task-vector"])
def test_other_dtypes_are_a_loss(name: str, tmp_path: Path) -> None:
    old = {"proj.weight": floats("BF16", 12, 10), "q": noise("F8_E4M3", 3)}
    new = {"proj.weight": with_bits(old["proj.weight"], {3: 0x3F80}), "q": old["q"].changed(1)}
    given = pair(tmp_path, old, new)
    with pytest.raises(
        LossyConversion, match="1 changed elements of 'q', because its dtype F8_E4M3"
    ):
        sparsedelta.convert(given.delta, tmp_path / "out", base=given.base, write_as=name)


@pytest.mark.parametrize("name", ["shira", "task-vector"])
def test_additive_forms_lose_nan_and_the_sign_of_zero(name: str, tmp_path: Path) -> None:
    old = {"proj.weight": with_bits(floats("F32", 12, 10), {1: 0}, 4)}
    changes = {0: 0x7FC00000, 1: 0x80000000, 2: 0x3F800000}
    given = pair(tmp_path, old, {"proj.weight": with_bits(old["proj.weight"], changes, 4)})
    options: dict[str, Any] = {"base": given.base, "write_as": name}
    with pytest.raises(
        LossyConversion, match=r"1 elements of 'proj.weight' whose new value is NaN"
    ):
        sparsedelta.convert(given.delta, tmp_path / "out", **options)
    report = sparsedelta.convert(given.delta, tmp_path / "out", lossy=True, **options)
    assert report.nnz == 1
    assert any("sign of zero" in loss for loss in report.losses)


def test_missing_and_ambiguous_names(tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    foreign = written(tmp_path, given, ("trl-v2", {}))
    lacking = write_file(tmp_path / "lacking.safetensors", {"other": floats("BF16", 2)})
    with pytest.raises(StructureMismatch, match=r"changes 'proj.weight', which .* lacks"):
        sparsedelta.convert(foreign, tmp_path / "x.sd", base=lacking)
    shutil.copy(given.base / "model.safetensors", given.base / "model.fp16.safetensors")
    with pytest.raises(StructureMismatch, match="leave out one of the files"):
        sparsedelta.convert(foreign, tmp_path / "x.sd", base=given.base)
    sparsedelta.convert(foreign, tmp_path / "x.sd", base=given.base, exclude=["model.fp16*"])


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if form.not_read])
def test_forms_that_are_not_read_say_why(name: str, tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    path = tmp_path / "foreign"
    if name == "mask":
        sparsedelta.convert(given.delta, path, base=given.base, write_as="mask", lossy=True)
    elif name == "z4ai":
        path.write_bytes(b"Z4DM" + bytes(60))
    else:
        write(path / "pytorch_diff.bin", b"\x80\x04")
    with pytest.raises(SparseDeltaError, match=r"cannot be read: .{30}"):
        sparsedelta.apply(given.base, path, tmp_path / "out")


@pytest.mark.parametrize("name", [n for n, form in FORMS.items() if form.not_written])
def test_forms_that_are_not_written_say_why(name: str, tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    with pytest.raises(SparseDeltaError, match=r"cannot be written: .{30}"):
        sparsedelta.convert(given.delta, tmp_path / "out", base=given.base, write_as=name)
    assert not (tmp_path / "out").exists()


def test_mask_is_true_where_the_target_differs(tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    out = tmp_path / "mask"
    sparsedelta.convert(given.delta, out, base=given.base, write_as="mask", lossy=True)
    raw = out.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert np.flatnonzero(np.frombuffer(data, np.uint8)).tolist() == [3, 50, 51, 119]
    assert len(data) == 120
    assert b'"proj.weight":{"dtype":"BOOL","shape":[12,10]' in raw


def test_arguments(tmp_path: Path) -> None:
    given = plain_pair(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"its name does not end in .sd"):
        sparsedelta.convert(given.delta, out, base=given.base)
    with pytest.raises(ValueError, match="there is no form 'nothing'"):
        sparsedelta.convert(given.delta, out, base=given.base, write_as="nothing")
    with pytest.raises(BaseNeeded):
        sparsedelta.convert(given.delta, tmp_path / "x.sd")
    for settings, message in (
        ({"colour": "red"}, "slime has no setting 'colour'"),
        ({"checksum": "md5"}, "setting checksum is 'md5', expected one of blake3"),
        ({"version": "-1"}, "setting version is '-1', expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsedelta.convert(
                given.delta, out, base=given.base, write_as="slime", settings=settings
            )
    with pytest.raises(BadMagic, match="does not have the form arc2"):
        sparsedelta.convert(given.target, tmp_path / "x.sd", base=given.base, read_as="arc2")
    text = write(tmp_path / "note.txt", "no delta")
    with pytest.raises(BadMagic, match="none of the known forms"):
        sparsedelta.convert(text, tmp_path / "x.sd", base=given.base)
    with pytest.raises(SparseDeltaError):
        sparsedelta.apply(given.base, text, tmp_path / "y")
    assert len(NAMES) == len({*NAMES}) == len(FORMS) + 3


def test_equal_checkpoints(tmp_path: Path) -> None:
    old: dict[str, Raw] = {"proj.weight": floats("BF16", 12, 10)}
    given = pair(tmp_path, old, old)
    for name in ("trl-v1", "slime", "grail", "pulsept1", "arc2"):
        out = tmp_path / name
        sparsedelta.convert(given.delta, out, base=given.base, write_as=name)
        sparsedelta.apply(given.base, out, tmp_path / f"{name}-out")
        assert_same_files(given.base, tmp_path / f"{name}-out")
    for name in ("trl-v2", "shira"):
        with pytest.raises(ValueError, match=r"equal|no layer"):
            sparsedelta.convert(given.delta, tmp_path / name, base=given.base, write_as=name)
