"""An output appears whole or not at all, and what it would replace stays until then."""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path

import pytest
from helpers import noise, tree, write, write_sharded

import sparsedelta
from sparsedelta.fs import staged_output, synced
from sparsedelta.system import reserve


def make(path: Path, content: bytes, *, folder: bool, overwrite: bool = False) -> None:
    with staged_output(path, overwrite=overwrite) as staged:
        assert not staged.exists()
        write(staged / "file" if folder else staged, content)


@pytest.mark.parametrize("folder", [True, False])
def test_output_appears_at_the_end(folder: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_output(out, overwrite=False) as staged:
        write(staged / "a/b" if folder else staged, b"x")
        assert not out.exists()
    assert tree(out) == ({"a": None, "a/b": b"x"} if folder else {"": b"x"})
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_failure_leaves_everything_as_it_was(
    error: type[BaseException], existing: bool, tmp_path: Path
) -> None:
    if existing:
        write(tmp_path / "out/old", b"old")
    before = tree(tmp_path)

    def fail() -> None:
        with staged_output(tmp_path / "out", overwrite=True) as staged:
            write(staged / "a", b"x")
            raise error

    with pytest.raises(error):
        fail()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("old", ["file", "folder", "link", "dangling link", "link to folder"])
def test_existing_output(old: str, folder: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / "elsewhere/kept", b"kept")
    if old == "file":
        write(out, b"old")
    elif old == "folder":
        write(out / "old", b"old")
    else:
        places = {"link": "elsewhere/kept", "dangling link": "nothing"}
        out.symlink_to(tmp_path / places.get(old, "elsewhere"))
    before = os.lstat(out)
    with pytest.raises(FileExistsError, match="exists; choose another name, or overwrite it"):
        make(out, b"new", folder=folder)
    assert os.lstat(out) == before
    make(out, b"new", folder=folder, overwrite=True)
    assert not out.is_symlink()
    assert tree(out) == ({"file": b"new"} if folder else {"": b"new"})
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]
    assert tree(tmp_path / "elsewhere") == {"kept": b"kept"}


def test_output_that_comes_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with staged_output(out, overwrite=False) as staged:
            write(staged, b"mine")
            write(out, b"theirs")

    with pytest.raises(FileExistsError):
        race()
    assert tree(tmp_path) == {"out": b"theirs"}


def test_failed_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out / "old", b"old")

    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        make(out, b"new", folder=True, overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/old": b"old"}


def test_folder_for_the_output_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        make(tmp_path / "none/out", b"x", folder=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🙂" * 63, "out"])
def test_long_names(name: str, tmp_path: Path) -> None:
    make(tmp_path / name, b"x", folder=False)
    assert tree(tmp_path) == {name: b"x"}


def test_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_output("out", overwrite=False) as staged:
        write(staged, b"x")
        monkeypatch.chdir("/")
    assert tree(tmp_path) == {"out": b"x"}


def test_everything_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = noise("U8", 50)
    for name, changed in (("base", tensor), ("target", tensor.changed(3))):
        write_sharded(tmp_path / name, [{"w": changed}, {"v": tensor}])
        write(tmp_path / name / "a/b/config.json", name)
        (tmp_path / name / "empty").mkdir()
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting(fd: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def renaming(path: Path, target: Path) -> None:
        events.append(f"rename {path}")
        replace(path, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "replace", renaming)
    with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta:
        delta.save(tmp_path / "delta.sd")
    at = events.index(next(e for e in events if e.startswith("rename")))
    assert events[at].removeprefix("rename ") in events[:at]
    assert str(tmp_path) in events[at:]
    events.clear()
    sparsedelta.apply(tmp_path / "base", tmp_path / "delta.sd", tmp_path / "out")
    at = events.index(next(e for e in events if e.startswith("rename")))
    made = events[at].removeprefix("rename ")
    wanted = {made, *(f"{made}/{path}" for path in tree(tmp_path / "out"))}
    assert wanted <= set(events[:at])
    assert str(tmp_path) in events[at:]


def test_files_are_synced_while_they_are_filled(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file, synced([file.fileno()]):
        file.write(b"x")
        file.flush()
    assert (tmp_path / "a").read_bytes() == b"x"


def test_failure_to_reach_the_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fsync(fd: int) -> None:
        if not failed.is_set():  # the system tells it once
            failed.set()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)

    def fill(*, wait: bool) -> None:
        with open(tmp_path / "a", "wb") as file, synced([file.fileno()]):
            if wait:
                failed.wait(10)

    with pytest.raises(OSError, match="Input/output error"):
        fill(wait=True)
    failed.clear()
    with pytest.raises(OSError, match="Input/output error"):
        fill(wait=False)


def test_reserved_file_has_its_size_and_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "xb") as file:
        reserve(file.fileno(), 10_000)
    assert path.read_bytes() == bytes(10_000)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves")
def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(tmp_path / "file", "xb") as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                reserve(file.fileno(), 10_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
