"""An output appears whole or not at all, and what it would replace stays until then."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import assert_same_files, noise, tree, write, write_sharded

import sparsedelta
from sparsedelta import system
from sparsedelta.fs import staged_output, synced, temporary_folder
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


@pytest.mark.parametrize("folder", [True, False])
def test_a_pipe_is_not_replaced(folder: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out' is a device, pipe or socket, which would be"):
        make(tmp_path / "out", b"new", folder=folder, overwrite=True)
    assert (tmp_path / "out").is_fifo()


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

    monkeypatch.setattr(system, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        make(out, b"new", folder=True, overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/old": b"old"}


def test_without_an_exchange_the_old_folder_can_be_found_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out / "old", b"old")
    between: list[dict[str, bytes | None]] = []
    replace = Path.replace

    def watched(path: Path, target: Path) -> None:
        between.append(tree(tmp_path))
        replace(path, target)

    monkeypatch.setattr(system, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "replace", watched)
    make(out, b"new", folder=True, overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}
    assert [name for name in between[0] if re.fullmatch(r"out\.\w{16}\.replaced/old", name)]


def test_a_folder_is_replaced_in_one_step(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    write(out / "file", b"0")
    write(other / "file", b"")
    if not system.exchange(out, other):
        pytest.skip("not on this file system")
    done = threading.Event()
    seen: set[bool] = set()

    def watch() -> None:
        while not done.is_set():
            seen.add(out.exists())

    thread = threading.Thread(target=watch)
    thread.start()
    for number in range(50):
        make(out, b"%d" % number, folder=True, overwrite=True)
    done.set()
    thread.join()
    assert seen == {True}


ABANDONED = ".gone.abcdefgh.sparsedelta.partial"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    if not system.is_local(tmp_path):
        pytest.skip("locks may tell nothing on this file system")
    kept = [
        ".rsync.partial",
        "out.sparsedelta.partial",
        ".other.abcdefgh.sparsedelta-unlocked.partial",
        ".running.abcdefgh.sparsedelta.partial",
    ]
    for name in [ABANDONED, *kept]:
        write(tmp_path / name / "new/a/b", b"x")
    (tmp_path / ".link.sparsedelta.partial").symlink_to("elsewhere", target_is_directory=True)
    write(tmp_path / "elsewhere/file", b"x")
    (tmp_path / ".empty.sparsedelta.partial").mkdir()
    before = tree(tmp_path)
    with (
        system.locked(tmp_path / kept[-1]) as is_locked,
        staged_output(tmp_path / "out", overwrite=False) as staged,
        staged_output(tmp_path / "out2", overwrite=False) as another,  # leaves the first alone
    ):
        assert is_locked
        write(staged, b"y")
        write(another, b"z")
    gone = {name for name in before if name.startswith((ABANDONED, ".empty"))}
    left = {name: content for name, content in before.items() if name not in gone}
    assert tree(tmp_path) == {**left, "out": b"y", "out2": b"z"}


KILLED_IN_A_TEMPORARY_FOLDER = """
import os, signal
from sparsedelta.fs import temporary_folder
with temporary_folder("push") as folder:
    (folder / "large").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_temporary_folders_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not system.is_local(tmp_path):
        pytest.skip("locks may tell nothing on this file system")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder("push") as alive:
        killed = subprocess.run([sys.executable, "-c", KILLED_IN_A_TEMPORARY_FOLDER], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(os.listdir(tmp_path)) == 2
        with temporary_folder("base") as folder:
            assert {alive.name, folder.name} == {*os.listdir(tmp_path)}
            assert not any(folder.iterdir())
    assert not os.listdir(tmp_path)


def test_where_locks_tell_nothing_partial_outputs_are_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "is_local", lambda _: False)
    with staged_output(tmp_path / "out", overwrite=False) as staged:
        name = staged.parent.name
        write(staged, b"x")
        monkeypatch.undo()
        make(tmp_path / "other", b"y", folder=False)
        assert staged.exists()
    assert name.endswith(".sparsedelta-unlocked.partial")
    assert tree(tmp_path) == {"out": b"x", "other": b"y"}


def test_an_output_found_before_it_was_locked_gets_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not system.is_local(tmp_path):
        pytest.skip("locks may tell nothing on this file system")
    mkdir, n_made = Path.mkdir, 0

    def made_and_removed(path: Path, *given: Any, **options: Any) -> None:
        nonlocal n_made
        mkdir(path, *given, **options)
        n_made += path.suffix == ".partial" and not options
        if n_made == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    make(tmp_path / "out", b"x", folder=False)
    assert n_made == 2
    assert tree(tmp_path) == {"out": b"x"}


@pytest.mark.parametrize("at", ["mkdir", "rmtree"])
def test_interrupt_while_the_partial_output_is_made_or_removed(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, n_calls = {"mkdir": Path, "rmtree": shutil}[at], 0
    real = getattr(module, at)

    def interrupted(*given: Any, **options: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if at == "mkdir" or n_calls > 1:
            real(*given, **options)
        if n_calls == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", b"x", folder=False)
    assert os.listdir(tmp_path) == (["out"] if at == "rmtree" else [])


def test_all_works_without_what_only_some_systems_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = noise("BF16", 5000)
    write_sharded(tmp_path / "base", [{"w": tensor}, {"v": tensor}])
    write_sharded(tmp_path / "target", [{"w": tensor.changed(3)}, {"v": tensor.changed(9, 2000)}])
    for name in ("preadv", "pread", "pwrite", "statvfs", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    for name in ("preadv", "pread", "pwrite", "statvfs"):
        assert not hasattr(os, name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(system, "_libc", lambda: None)
    for _ in range(2):
        with sparsedelta.diff(tmp_path / "base", tmp_path / "target") as delta:
            delta.save(tmp_path / "delta.sd", overwrite=True)
        sparsedelta.apply(
            tmp_path / "base", tmp_path / "delta.sd", tmp_path / "out", overwrite=True
        )
    assert_same_files(tmp_path / "target", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", "delta.sd", "out", "target"]


def test_every_module_and_command_works_without_posix(tmp_path: Path) -> None:
    tensor = noise("BF16", 5000)
    write_sharded(tmp_path / "base", [{"w": tensor}, {"v": tensor}])
    write_sharded(tmp_path / "target", [{"w": tensor.changed(3)}, {"v": tensor.changed(9, 2000)}])
    program = Path(__file__).with_name("without_posix.py")
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left = ".followed.sparsedelta-held.json again.sd back base channel delta.sd followed merged.sd nothing.sd other out page.html target undo.sd".split()
    assert done.stdout.splitlines() == [str(left)]
    assert_same_files(tmp_path / "target", tmp_path / "out")
    assert_same_files(tmp_path / "base", tmp_path / "back")


def test_folder_for_the_output_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        make(tmp_path / "none/out", b"x", folder=False)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_output_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("out"), b"x", folder=False)
    with pytest.raises(FileExistsError, match=r"^output 'out' exists"):
        make(Path("out"), b"y", folder=False)
    with pytest.raises(FileNotFoundError, match=r"^the folder of output 'none/out' does not"):
        make(Path("none/out"), b"y", folder=False)


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
    events.clear()
    sparsedelta.apply(tmp_path / "base", tmp_path / "delta.sd", tmp_path / "soon", durable=False)
    assert [event.partition(" ")[0] for event in events] == ["rename"]
    assert tree(tmp_path / "soon") == tree(tmp_path / "out")


def test_between_deltas_nothing_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = noise("U8", 50)
    two, three = one.changed(3), one.changed(4)
    for name, tensor in (("1", one), ("2", two), ("3", three)):
        write_sharded(tmp_path / name, [{"w": tensor}])
    for name in ("1", "2"):
        with sparsedelta.diff(tmp_path / name, tmp_path / str(int(name) + 1)) as delta:
            delta.save(tmp_path / f"{name}.sd")
    synced_files: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced_files.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    sparsedelta.apply(tmp_path / "1", [tmp_path / "1.sd", tmp_path / "2.sd"], tmp_path / "out")
    assert_same_files(tmp_path / "out", tmp_path / "3")
    assert synced_files
    assert not [file for file in synced_files if "/step-" in file]


def test_files_are_synced_while_they_are_filled(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file, synced([file.fileno()]):
        file.write(b"x")
        file.flush()
    assert (tmp_path / "a").read_bytes() == b"x"


def test_every_one_of_many_files_is_synced_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        fds = [stack.enter_context(open(tmp_path / f"{n}", "wb")).fileno() for n in range(40)]
        done: list[int] = []
        monkeypatch.setattr(os, "fsync", done.append)
        with synced(fds):
            pass
        assert {*done} == {*fds}

        def fail_for_the_last(fd: int) -> None:
            done.append(fd)
            if fd == fds[-1]:
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail_for_the_last)
        with pytest.raises(OSError, match="Input/output error"), synced(fds):
            pass


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
