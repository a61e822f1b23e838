"""diff, apply and verify on executors: the same bytes, the same errors, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    assert_same_files,
    noise,
    small_chunks,
    tree,
    write,
    write_file,
    write_sharded,
)

import sparsedelta
from sparsedelta import errors
from sparsedelta.tensors import tasks
from sparsedelta.tensors.rebuild import BaseDiffers

LARGE = noise("U8", (1 << 24) + (1 << 20))  # two chunks
SMALL = {f"small.{n}": noise("BF16", 40, seed=n) for n in range(30)}
BASE = SMALL | {"w": noise("F32", 300, 70), "large": LARGE, "old": noise("I64", 5)}
TARGET = (
    {name: raw.changed(3) for name, raw in SMALL.items()}
    | {"w": BASE["w"].changed(*range(0, 80_000, 40)), "large": LARGE.changed(5, 1 << 24)}
    | {"new": noise("F16", 70, 3), "w_longer": noise("F32", 301, 70)}
)


class RayExecutor:
    """Ray with the interface of concurrent.futures, as docs/distributed.md shows it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> RayFuture:
        import ray

        return RayFuture(ray.remote(fn).remote(*args))


class RayFuture:
    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def result(self) -> Any:
        import ray

        return ray.get(self.reference)


@pytest.fixture(scope="module", params=["threads", "processes", "dask", "ray"])
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield pool
    elif request.param == "processes":
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    elif request.param == "dask":
        distributed = pytest.importorskip("distributed")
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client.get_executor()
    else:
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield RayExecutor()
        ray.shutdown()


pytestmark = pytest.mark.filterwarnings("default")  # of Dask and Ray


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    for name, tensors in (("base", BASE), ("target", TARGET)):
        items = list(tensors.items())
        write_sharded(root / name, [dict(items[:31]), dict(items[31:])])
        write(root / name / "config.json", name)
    return root / "base", root / "target"


@pytest.fixture(params=[False, True], ids=["whole", "divided"])
def divided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(tasks, "SPLIT_BYTES", 1 << 20)
        monkeypatch.setattr(tasks, "TASK_BYTES", 1 << 12)


def error_of(work: Callable[..., Any], *args: Any, **options: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - compared by the caller
        work(*args, **options)
    return type(caught.value), str(caught.value)


@pytest.mark.usefixtures("divided")
def test_the_same_bytes(executor: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    for options in ({}, {"values": "target", "level": "fast"}, {"standalone": True}):
        with (
            sparsedelta.diff(base, target, **options) as one,
            sparsedelta.diff(base, target, executor=executor, **options) as other,
        ):
            assert other.to_bytes() == one.to_bytes()
    delta, out = tmp_path / "delta.sd", tmp_path / "out"
    sparsedelta.diff(base, target, executor=executor).save(delta)
    sparsedelta.apply(base, delta, out, executor=executor)
    assert_same_files(target, out)
    report = sparsedelta.verify(delta, base=base, target=out, executor=executor)
    assert report == sparsedelta.verify(delta, base=base, target=out)
    back = sparsedelta.diff(target, base, executor=executor)
    sparsedelta.apply(base, [delta, back], tmp_path / "back", verify="touched", executor=executor)
    assert_same_files(base, tmp_path / "back")
    assert sorted(os.listdir(tmp_path)) == ["back", "delta.sd", "out"]


@pytest.mark.usefixtures("divided")
def test_the_same_errors(executor: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    delta, damaged, out = tmp_path / "delta.sd", tmp_path / "damaged.sd", tmp_path / "out"
    sparsedelta.diff(base, target).save(delta)
    raw = bytearray(delta.read_bytes())
    raw[-3] ^= 1  # of the last chunk
    damaged.write_bytes(raw)
    wrong = tmp_path / "wrong"
    write_sharded(wrong, [dict(list((BASE | {"large": LARGE.changed(77)}).items()))])
    write(wrong / "config.json", "base")
    cases: list[tuple[Callable[..., Any], Any, Any]] = [
        (sparsedelta.apply, (base, damaged, out), {}),
        (sparsedelta.apply, (target, delta, out), {}),
        (sparsedelta.apply, (wrong, delta, out), {}),
        (sparsedelta.verify, (damaged,), {}),
        (sparsedelta.verify, (delta,), {"base": wrong}),
        (sparsedelta.verify, (delta,), {"target": base}),
    ]
    for work, args, options in cases:
        expected = error_of(work, *args, **options)
        assert issubclass(expected[0], sparsedelta.SparseDeltaError)
        assert error_of(work, *args, executor=executor, **options) == expected
    assert sorted(os.listdir(tmp_path)) == ["damaged.sd", "delta.sd", "wrong"]


def test_small_chunks_in_ranges(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_file(tmp_path / "base", {"w": noise("F64", 1000), "v": noise("BF16", 999)})
    target = write_file(
        tmp_path / "target",
        {"w": noise("F64", 1000).changed(0, 3000, 7999), "v": noise("BF16", 1200, seed=1)},
    )
    small_chunks(monkeypatch, 64, 128)
    monkeypatch.setattr(tasks, "SPLIT_BYTES", 100)
    monkeypatch.setattr(tasks, "TASK_BYTES", 700)
    monkeypatch.setattr(tasks, "MOST_WAITING", 3)
    with ThreadPoolExecutor(2) as pool:
        one, other = (sparsedelta.diff(base, target, executor=e) for e in (None, pool))
        assert other.to_bytes() == one.to_bytes()
        assert max(len(row.chunks) for row in other.tensors) > 15
        sparsedelta.apply(base, other, tmp_path / "out", executor=pool)
    assert_same_files(target, tmp_path / "out")


class Ending:
    """An executor that ends in the middle: a worker is killed, or a result cannot be waited for."""

    def __init__(self, inner: ProcessPoolExecutor, after: int, error: BaseException | None) -> None:
        self.inner = inner
        self.left = after
        self.error = error
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        self.left -= 1
        if self.left == 0 and self.error:
            raise self.error
        future = self.inner.submit(os._exit, 9) if self.left == 0 else self.inner.submit(fn, *args)
        self.futures.append(future)
        return future


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["worker killed", "interrupt"])
def test_nothing_is_left_behind(
    error: BaseException | None,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, target = pair
    delta = tmp_path / "delta.sd"
    sparsedelta.diff(base, target).save(delta)
    before = tree(tmp_path)
    monkeypatch.setattr(tasks, "TASK_BYTES", 1 << 12)
    expected = type(error) if error else BrokenProcessPool
    for work in (
        lambda pool: sparsedelta.apply(base, delta, tmp_path / "out", executor=pool),
        lambda pool: sparsedelta.diff(base, target, spool_dir=str(tmp_path), executor=pool),
        lambda pool: sparsedelta.verify(delta, base=base, executor=pool),
    ):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as inner:
            ending = Ending(inner, 3, error)
            with pytest.raises(expected):
                work(ending)
            assert ending.futures
            assert all(future.done() for future in ending.futures)
        assert tree(tmp_path) == before


def test_a_changed_file_is_reported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    copy = write_file(tmp_path / "target.safetensors", TARGET)

    class Late:
        def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
            os.utime(copy, ns=(1, 1))
            future: Future[Any] = Future()
            future.set_result(fn(*args))
            return future

    with pytest.raises(errors.CheckpointError, match="changed while it was read"):
        sparsedelta.diff(base, copy, executor=Late())


def test_what_workers_cannot_read_is_refused(pair: tuple[Path, Path]) -> None:
    torch = pytest.importorskip("torch")
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="in memory, but workers"):
        sparsedelta.diff({"w": torch.zeros(3)}, {"w": torch.ones(3)}, executor=pool)
    for work in (
        lambda: sparsedelta.diff(*pair, executor=4),  # type: ignore[arg-type]
        lambda: sparsedelta.apply(pair[0], "delta.sd", "out", executor=4),  # type: ignore[arg-type]
        lambda: sparsedelta.verify("delta.sd", executor=4),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="executor is 4, expected None or an object"):
            work()


@pytest.mark.parametrize("kind", errors.by_code().values(), ids=lambda kind: kind.code)
def test_every_error_can_be_pickled(kind: type[errors.SparseDeltaError]) -> None:
    error = kind("what is wrong", tensor="w", expected="1", found="2")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.tensor, copy.expected, copy.found) == ("what is wrong", "w", "1", "2")


def test_the_internal_error_can_be_pickled(pair: tuple[Path, Path]) -> None:
    with sparsedelta.diff(*pair) as delta:
        copy = pickle.loads(pickle.dumps(BaseDiffers(delta.tensors[0], b"digest")))
    assert (copy.row, copy.digest) == (delta.tensors[0], b"digest")
