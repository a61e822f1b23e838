"""``merge``: each method beside its formula on whole tensors, and what it leaves alone or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import Raw, noise, of_array, small_chunks, tree, write, write_file, write_sharded

import sparsedelta
from sparsedelta.dtypes import DTYPES
from sparsedelta.errors import BaseMismatch, ConflictError, StructureMismatch
from sparsedelta.ops.merging.floats import to_bits, to_numbers
from sparsedelta.ops.merging.recipe import dropped_at_random, kept_largest, make_recipe

Array = npt.NDArray[Any]
SHAPE = (40, 30)


def bf16(values: Array) -> Raw:
    bits = torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16).numpy()
    return of_array("BF16", bits.reshape(values.shape))


def numbers(raw: Raw) -> Array:
    """Return the values of a tensor in float64."""
    dtype = {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
    flat = torch.frombuffer(bytearray(raw.data), dtype=dtype[raw.dtype])
    return flat.double().numpy().reshape(raw.shape)


def as_dtype(dtype: str, values: Array) -> Raw:
    if dtype == "BF16":
        return bf16(values)
    return of_array(dtype, values.astype({"F16": "f2", "F32": "f4", "F64": "f8"}[dtype]))


def variants(dtype: str, n_variants: int, *, share: float = 0.3) -> tuple[Raw, list[Raw]]:
    """Return a base and targets, each with a share of its elements changed."""
    draw = np.random.default_rng(0)
    base = draw.standard_normal(SHAPE)
    targets = []
    for _ in range(n_variants):
        changed = draw.random(SHAPE) < share
        targets.append(as_dtype(dtype, base + changed * draw.standard_normal(SHAPE) * 0.1))
    return as_dtype(dtype, base), targets


class Bench:
    """A base and deltas on disk."""

    def __init__(self, path: Path, base: Raw, targets: Sequence[Raw], values: str = "ulp") -> None:
        self.path = path
        self.base = write(path / "base" / "config.json", "{}").parent
        write_file(self.base / "model.safetensors", {"other": noise("F32", 3), "w": base})
        self.deltas: list[Path] = []
        for number, target in enumerate(targets):
            folder = path / f"target-{number}"
            write_file(folder / "model.safetensors", {"other": noise("F32", 3), "w": target})
            self.deltas.append(path / f"{number}.sd")
            with sparsedelta.diff(self.base, folder, values=values) as delta:
                delta.save(self.deltas[-1])

    def merge(self, **options: Any) -> Raw:
        """Return the merged tensor, made on disk by the merged delta."""
        path, out = self.path / "merged.sd", self.path / "out"
        with sparsedelta.merge(self.base, *self.deltas, **options) as merged:
            merged.save(path, overwrite=True)
        sparsedelta.verify(path, base=self.base)
        sparsedelta.apply(self.base, path, out, overwrite=True)
        files = tree(out)
        assert files.keys() == tree(self.base).keys()
        raw = files["model.safetensors"]
        assert raw is not None
        spec = read_shape(self.base)
        return spec.with_data(raw[-len(spec.data) :])


def read_shape(base: Path) -> Raw:
    raw = (base / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])["w"]
    begin, end = entry["data_offsets"]
    return Raw(entry["dtype"], tuple(entry["shape"]), raw[8 + size + begin : 8 + size + end])


def assert_one_rounding(found: Raw, wanted: Array) -> None:
    """Check that values are the wanted ones, rounded: to the nearest but for the float32 before it."""
    nearest = numbers(as_dtype(found.dtype, wanted))
    got = numbers(found)
    # What cancels leaves the error of its parts, which are of the size of 1 and of that precision.
    floor = {"BF16": 2.0**-16, "F16": 2.0**-13, "F32": 1.0, "F64": 1.0}[found.dtype]
    ulp = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-22, "F64": 2.0**-51}[found.dtype]
    assert np.all(np.abs(got - nearest) <= ulp * np.maximum(np.abs(nearest), floor))
    if found.dtype in ("BF16", "F16"):
        assert np.mean(got == nearest) > 0.995


def trimmed(difference: Array, density: float) -> Array:
    n_kept = max(1, int(density * difference.size))
    order = np.argsort(-np.abs(difference).reshape(-1), kind="stable")
    kept = np.zeros(difference.size)
    kept[order[:n_kept]] = 1
    return difference * kept.reshape(difference.shape)


def elected(weighted: Array, weights: Array) -> tuple[Array, Array]:
    agrees = np.sign(weighted) == np.where(weighted.sum(axis=0) >= 0, 1, -1)
    divisor = (weights * agrees).sum(axis=0)
    return (weighted * agrees).sum(axis=0), np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("values", ["ulp", "target"])
class TestFormulas:
    weights = np.array([0.7, 0.3, 0.5])

    def bench(self, path: Path, dtype: str, values: str) -> tuple[Bench, Array, Array]:
        base, targets = variants(dtype, 3)
        differences = np.stack([numbers(target) - numbers(base) for target in targets])
        return Bench(path, base, targets, values), numbers(base), differences

    def test_linear(self, tmp_path: Path, dtype: str, values: str) -> None:
        bench, base, differences = self.bench(tmp_path, dtype, values)
        average = np.tensordot(self.weights, base + differences, 1) / self.weights.sum()
        assert_one_rounding(bench.merge(weights=self.weights), average)
        assert_one_rounding(bench.merge(), base + differences.mean(axis=0))

    def test_task_arithmetic(self, tmp_path: Path, dtype: str, values: str) -> None:
        bench, base, differences = self.bench(tmp_path, dtype, values)
        wanted = base + 0.5 * np.tensordot(self.weights, differences, 1)
        found = bench.merge(method="task-arithmetic", weights=self.weights, scale=0.5)
        assert_one_rounding(found, wanted)

    @pytest.mark.parametrize("density", [1.0, 0.2, 0.001])
    @pytest.mark.parametrize("normalize", [None, False])
    def test_ties(
        self,
        tmp_path: Path,
        dtype: str,
        values: str,
        density: float,
        normalize: bool | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert sparsedelta.merge is not sparsedelta.diff  # its modules are imported now
        small_chunks(monkeypatch, 256, 128)
        monkeypatch.setattr("sparsedelta.ops.merging.merged_tensor._BLOCK_ELEMENTS", 100)
        bench, base, differences = self.bench(tmp_path, dtype, values)
        weights = self.weights[:, None, None]
        kept = np.stack([trimmed(difference, density) for difference in differences])
        merged, divisor = elected(weights * kept, weights)
        wanted = base + (merged if normalize is False else merged / divisor)
        found = bench.merge(
            method="ties", weights=self.weights, density=density, normalize=normalize
        )
        assert_one_rounding(found, wanted)


@pytest.mark.parametrize(("density", "n_kept"), [(0.5, None), (0.25, None), (0.125, 1)])
def test_a_density_that_cuts_nothing_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, density: float, n_kept: int | None
) -> None:
    base = noise("F32", 8)  # of which a quarter is changed
    bench = Bench(tmp_path, base, [base.changed(0, 4)])
    bench.merge(method="ties", density=density)
    assert sparsedelta.inspect(tmp_path / "merged.sd").nnz == (n_kept or 2)
    expected = f"density {density} cuts nothing: ties keeps this share of all elements of a tensor, and no delta"
    assert [m.startswith(expected) for m in caplog.messages] == [True] * (n_kept is None)
    assert n_kept or "more than 0.25 of one" in caplog.text


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
class TestDare:
    def test_every_element_is_dropped_or_scaled(self, tmp_path: Path, method: str) -> None:
        base, (target,) = variants("F64", 1, share=0.9)
        difference = numbers(target) - numbers(base)
        bench = Bench(tmp_path, base, [target])
        found = numbers(bench.merge(method=method, density=0.3, seed=1)) - numbers(base)
        touched = difference != 0
        kept = found != 0
        assert not (kept & ~touched).any()
        share = kept.sum() / touched.sum()
        assert 0.25 < share < 0.35
        factor = np.abs(difference).sum() / np.abs(difference[kept]).sum()
        np.testing.assert_allclose(found[kept], factor * difference[kept], rtol=1e-9)

    def test_the_seed_decides(self, tmp_path: Path, method: str) -> None:
        base, targets = variants("F32", 2)
        bench = Bench(tmp_path, base, targets)
        made = [bench.merge(method=method, density=0.5, seed=s).data for s in (3, 3, 4)]
        assert made[0] == made[1]
        assert made[0] != made[2]

    def test_deltas_are_thinned_out_apart(self, tmp_path: Path, method: str) -> None:
        base, (target,) = variants("F64", 1)
        bench = Bench(tmp_path, base, [target, target])
        found = numbers(bench.merge(method=method, density=0.5, normalize=False)) - numbers(base)
        difference = numbers(target) - numbers(base)
        touched = difference != 0
        ratios = np.round(found[touched] / difference[touched])
        assert {*ratios} == {0.0, 2.0, 4.0}

    def test_density_one_drops_nothing(self, tmp_path: Path, method: str) -> None:
        base, targets = variants("BF16", 2)
        bench = Bench(tmp_path, base, targets)
        alike = {"dare": "task-arithmetic", "dare-ties": "ties"}[method]
        plain = bench.merge(method=alike, normalize=False)
        assert bench.merge(method=method, density=1.0).data == plain.data


def test_what_is_not_touched_keeps_its_bits(tmp_path: Path) -> None:
    base = noise("BF16", 50, 40)  # infinities, NaN payloads and negative zeros among them
    special = np.frombuffer(base.data, np.uint16).copy()
    special[:4] = 0x8000, 0x7F81, 0xFFC1, 0x0001
    base = of_array("BF16", special.reshape(50, 40))
    one, other = base.changed(100, 200), base.changed(300)
    found = Bench(tmp_path, base, [one, other]).merge(method="task-arithmetic")
    changed = np.flatnonzero(np.frombuffer(found.data, np.uint16) != special)
    assert {*changed} <= {50, 100, 150}


def test_one_delta_alone_is_itself(tmp_path: Path) -> None:
    base, (target,) = variants("BF16", 1)
    assert Bench(tmp_path, base, [target]).merge().data == target.data


def test_it_is_a_delta_of_the_base(tmp_path: Path) -> None:
    base, targets = variants("BF16", 2)
    bench = Bench(tmp_path, base, targets)
    with (
        sparsedelta.load(bench.deltas[0]) as first,
        sparsedelta.merge(bench.base, *bench.deltas, weights=[1, 3], method="ties") as merged,
    ):
        assert merged.base == first.base
        assert merged.base_fingerprint == first.base_fingerprint
        assert merged.target_fingerprint is not None
        assert [row.is_copied for row in merged.tensors] == [True, False]
        assert merged.info["merged"] == {
            "method": "ties",
            "weights": [1.0, 3.0],
            "normalize": True,
            "scale": 1.0,
            "targets": [delta_target(path) for path in bench.deltas],
            "density": [1.0, 1.0],
        }
        merged.save(tmp_path / "m.sd")
        with sparsedelta.merge(bench.base, *bench.deltas, weights=[1, 3], method="ties") as again:
            again.save(tmp_path / "n.sd")
    assert (tmp_path / "m.sd").read_bytes() == (tmp_path / "n.sd").read_bytes()


def delta_target(path: Path) -> str | None:
    with sparsedelta.load(path) as delta:
        return delta.target_fingerprint.hex() if delta.target_fingerprint else None


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"method": "slerp"}, "method is 'slerp', expected one of linear"),
            ({"weights": [1.0]}, "1 weight is given for 2 deltas"),
            ({"weights": [1.0, float("nan")]}, "finite"),
            ({"density": 0.5}, "keeps all changes; leave it out"),
            ({"method": "ties", "density": 0.0}, "density is 0, but .* above 0 and at most 1"),
            ({"weights": [0.0, -0.0], "method": "ties"}, "merged model would be the base"),
            ({"weights": [1.0, -1.0]}, "weights are 1,-1 and sum to 0, .* --no-normalize"),
            ({"weights": [0.3, -0.3000000001], "method": "dare", "normalize": True}, "sum to 0"),
            ({"method": "ties", "density": [0.5, 1.5]}, "above 0 and at most 1"),
            ({"method": "ties", "density": [0.5, 0.5, 0.5]}, "3 densities are given"),
        ],
    )
    def test_settings(self, tmp_path: Path, options: dict[str, Any], match: str) -> None:
        base, targets = variants("BF16", 2)
        with pytest.raises(ValueError, match=match):
            Bench(tmp_path, base, targets).merge(**options)

    def test_none(self, tmp_path: Path) -> None:
        base, _ = variants("BF16", 0)
        with pytest.raises(ValueError, match="at least one"):
            Bench(tmp_path, base, []).merge()

    def test_another_base(self, tmp_path: Path) -> None:
        base, targets = variants("BF16", 2)
        bench = Bench(tmp_path / "a", base, targets)
        other = Bench(tmp_path / "b", noise("BF16", *SHAPE), targets)
        with pytest.raises(
            ConflictError, match="1 and 2 were made from different bases: tensor 'w'"
        ):
            sparsedelta.merge(bench.base, bench.deltas[0], other.deltas[1])
        with pytest.raises(BaseMismatch):
            sparsedelta.merge(other.base, *bench.deltas)

    @pytest.mark.parametrize(
        "kind", ["grown", "reshaped", "retyped", "added", "copied", "renamed", "copied elsewhere"]
    )
    def test_structure(self, tmp_path: Path, kind: str) -> None:
        base, _ = variants("BF16", 0)
        other = noise("F32", 3)
        made: dict[str, dict[str, Raw]] = {
            "grown": {"w": Raw("BF16", (41, 30), base.data + base.data[:60])},
            "reshaped": {"w": Raw("BF16", (30, 40), base.data)},
            "retyped": {"w": noise("F16", 40, 30)},
            "added": {"w": base, "x": noise("F32", 5)},
            "copied": {"w": base, "x": base},
            "renamed": {"x": base},
            "copied elsewhere": {"w": base},
        }
        bench = Bench(tmp_path, base, [base.changed(0)])
        folder = tmp_path / "other"
        write_file(folder / "model.safetensors", {"other": other} | made[kind])
        if kind == "copied elsewhere":
            write_file(folder / "model.fp16.safetensors", {"w": base.changed(2)})
        with (
            sparsedelta.diff(bench.base, folder) as delta,
            pytest.raises(StructureMismatch, match="delta 2 adds, renames, retypes or reshapes"),
        ):
            sparsedelta.merge(bench.base, bench.deltas[0], delta)

    def test_a_tensor_that_one_removes(self, tmp_path: Path) -> None:
        base, _ = variants("BF16", 0)
        bench = Bench(tmp_path, base, [base.changed(0)])
        folder = write_file(tmp_path / "less" / "model.safetensors", {"w": base}).parent
        with (
            sparsedelta.diff(bench.base, folder) as delta,
            pytest.raises(StructureMismatch, match="delta 2 removes tensor 'other'"),
        ):
            sparsedelta.merge(bench.base, bench.deltas[0], delta)

    def test_a_delta_that_is_given_twice_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = noise("F32", 5)
        bench = Bench(tmp_path, base, [base.changed(0), base.changed(8)])
        bench.merge()
        assert not caplog.messages
        with sparsedelta.merge(bench.base, *bench.deltas, bench.deltas[1]):
            assert "deltas 2 and 3 have the same target, which counts twice" in caplog.text

    def test_integers_only_if_all_agree(self, tmp_path: Path) -> None:
        base = noise("I64", 5)
        same, other = base.changed(0), base.changed(8)
        assert Bench(tmp_path / "a", base, [same, same]).merge().data == same.data
        for targets in ([same, other], [same, base]):
            bench = Bench(tmp_path / f"b{targets[1].data.hex()}", base, targets)
            with pytest.raises(ConflictError, match="has dtype I64, which cannot be merged"):
                bench.merge()


def test_tensors_that_no_delta_knows_stay(tmp_path: Path) -> None:
    """Those put into the base since, and those that every target was made without."""
    base, (one, other) = variants("BF16", 2)
    bench = Bench(tmp_path, base, [one, other])
    plain = bench.merge()
    write_file(bench.base / "extra.safetensors", {"z": noise("F32", 7)})
    assert bench.merge().data == plain.data
    with sparsedelta.merge(bench.base, *bench.deltas) as merged:
        assert [(row.name, row.is_copied) for row in merged.tensors] == [
            ("z", True), ("other", True), ("w", False),
        ]  # fmt: skip
        assert merged.base.n_unused == 0
    with sparsedelta.merge(bench.base, *bench.deltas, exclude=["extra.*"]) as merged:
        assert [file.path for file in merged.target.weight_files] == ["model.safetensors"]
    for path, target in zip(bench.deltas, (one, other), strict=True):
        folder = write_file(tmp_path / path.stem / "model.safetensors", {"w": target}).parent
        with sparsedelta.diff(bench.base, folder) as delta:
            assert delta.base.n_unused == 2
            delta.save(path, overwrite=True)
    assert bench.merge().data == plain.data


def test_deltas_of_other_layouts_are_merged(tmp_path: Path) -> None:
    """What a target is laid out in is no concern of the merge, whose files are the base's."""
    base, (one, other) = variants("BF16", 2)
    bench = Bench(tmp_path, base, [one, other])
    plain = bench.merge()
    shards = write_sharded(tmp_path / "shards", [{"w": other}, {"other": noise("F32", 3)}])
    with sparsedelta.diff(bench.base, shards) as delta:
        delta.save(bench.deltas[1], overwrite=True)
    assert bench.merge().data == plain.data


def test_an_integer_tensor_in_a_file_that_the_base_does_not_have(tmp_path: Path) -> None:
    counts, weights = noise("I64", 50), noise("F32", 60)
    write_file(tmp_path / "base/model.safetensors", {"counts": counts, "w": weights})
    target = {"counts": counts.changed(7), "w": weights.changed(4)}
    write_file(tmp_path / "target/other.safetensors", target)
    with (
        sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta,
        sparsedelta.merge(tmp_path / "base", delta) as merged,
    ):
        merged.save(tmp_path / "merged.sd")
    sparsedelta.apply(tmp_path / "base", tmp_path / "merged.sd", tmp_path / "out")
    write_file(tmp_path / "expected/model.safetensors", target)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_deltas_with_chunks_at_other_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, targets = variants("BF16", 3)
    bench = Bench(tmp_path, base, targets)
    options: dict[str, Any] = {"method": "ties", "density": 0.3}
    plain = bench.merge(**options)
    for number, (path, span) in enumerate(zip(bench.deltas, (100, 370, 999), strict=True)):
        with pytest.MonkeyPatch.context() as patch:
            small_chunks(patch, span, 1 << 10)
            with sparsedelta.diff(bench.base, tmp_path / f"target-{number}") as delta:
                assert len(delta.tensors[1].chunks) == -(-1200 // span)
                delta.save(path, overwrite=True)
    assert bench.merge(**options).data == plain.data
    small_chunks(monkeypatch, 256, 128)
    assert bench.merge(**options).data == plain.data


class TestFloats:
    def test_every_bf16(self) -> None:
        bits = np.arange(1 << 16, dtype=np.uint16)
        found = to_numbers(DTYPES["BF16"], bits)
        wanted = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))
        finite = ~np.isnan(found)
        np.testing.assert_array_equal(to_bits(DTYPES["BF16"], found)[finite], bits[finite])

    def test_rounding_is_torchs(self) -> None:
        raw = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
        raw[:3] = 0x3F808000, 0x3F818000, 0x7F7FFFFF  # ties to even, and up to infinity
        values = raw.view(np.float32)
        values = values[~np.isnan(values)]
        wanted = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy()
        np.testing.assert_array_equal(to_bits(DTYPES["BF16"], values).view(np.int16), wanted)
        assert np.isnan(
            to_numbers(DTYPES["BF16"], to_bits(DTYPES["BF16"], np.array([np.nan], np.float32)))
        )


def test_kept_largest_counts_equals() -> None:
    least, n_equal = kept_largest(np.array([1, 5, 2, 2, 2, 0], np.float32), 3)
    assert (float(least), n_equal) == (2.0, 2)


def test_the_random_choice_is_fixed() -> None:
    """Files made with a seed must stay the same: these bits were drawn once and for all."""
    dropped = dropped_at_random(bytes(range(16)), 0.5, 1000)
    assert 450 < dropped.sum() < 550
    assert "".join(str(int(d)) for d in dropped[:16]) == "1101011001010101"


def test_recipe_defaults() -> None:
    made: Callable[..., Any] = make_recipe
    options = {"normalize": None, "scale": 1.0, "seed": 0}
    assert made(2, "linear", None, None, **options).normalize
    assert made(2, "ties", None, None, **options).normalize
    assert not made(2, "dare-ties", None, 0.5, **options).normalize
    assert made(2, "dare", None, 0.5, **options).densities == (0.5, 0.5)


@pytest.mark.parametrize("method", ["ties", "task-arithmetic"])
def test_weights_may_sum_to_0_where_their_sum_is_no_divisor(method: str) -> None:
    recipe = make_recipe(2, method, [1, -1], None, normalize=None, scale=1, seed=0)
    assert recipe.weights == (1, -1)
