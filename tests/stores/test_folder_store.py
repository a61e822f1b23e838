"""Failures of a folder as a store: killed writers, full disks, file systems without links."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsedelta import fs, system
from sparsedelta.stores import folder as folder_module
from sparsedelta.stores import open_store
from sparsedelta.stores.folder import FolderStore

WRITER = """
import sys
from sparsedelta.stores.folder import FolderStore
store = FolderStore(sys.argv[1])
for n in range(10**6):
    content = (b"%08d" % n) * 100_000
    if n % 2:
        store.create(f"deltas/{n}", content)
    else:
        store.write("head", content)
    print(n, flush=True)
"""


def is_whole(content: bytes) -> bool:
    return len(content) == 800_000 and content == content[:8] * 100_000


def leftovers(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if name.startswith(".")]


def test_killed_writer_leaves_whole_objects(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    left = 0
    for n in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.003 * n)
            writer.send_signal(signal.SIGKILL)
        names = store.list("")
        assert "head" in names
        for name in names:
            assert is_whole(store.read(name, 10**6) or b""), name
        left += bool(leftovers(tmp_path / "store"))
    store.write("last", b"1")
    assert left > 0  # else nothing was killed while it wrote
    assert leftovers(tmp_path / "store") == []


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_failed_write_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "store")
    store.write("a/b", b"before")

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os if call != "replace" else Path, call, full)
        if call != "link":
            with pytest.raises(OSError, match="No space") as caught:
                store.write("a/b", b"after")
            assert caught.value.filename == str(tmp_path / "store" / "a" / "b")
        if call != "replace":
            with pytest.raises(OSError, match="No space"):
                store.create("a/new", b"new")
    assert store.list("") == ["a/b"]
    assert store.read("a/b", 9) == b"before"
    assert leftovers(tmp_path / "store") == []


def no_links(*_arguments: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_without_hard_links_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_rename(tmp_path):
        pytest.skip("this system has no rename that keeps what is there")
    monkeypatch.setattr(os, "link", no_links)
    store = FolderStore(tmp_path / "store")
    assert store.has_create
    assert store.create("a", b"1")
    real = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: path != store._place("a") and real(path))
    assert not store.create("a", b"2")  # found only by the rename
    assert store.read("a", 9) == b"1"
    assert leftovers(tmp_path / "store") == []


def can_rename(folder: Path) -> bool:
    (folder / "one").touch()
    return system.rename_new(folder / "one", folder / "two")


def test_without_both_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(system, "rename_new", lambda _old, _new: False)
    store = FolderStore(tmp_path / "store")
    assert (store.writable, store.has_create) == (True, False)
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a", 9) == b"1"


def test_link_whose_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(old: Path, new: Path) -> None:
        link(old, new)
        link(old, new)

    store = FolderStore(tmp_path / "store")
    monkeypatch.setattr(os, "link", twice)
    assert store.create("a", b"1")
    assert not store.create("a", b"2")


def test_links_are_not_followed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.write("a/real", b"1")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"secret")
    (tmp_path / "store" / "deltas").symlink_to(tmp_path / "outside")
    (tmp_path / "store" / "a" / "link").symlink_to(tmp_path / "outside" / "x")
    for name in ("deltas/x", "a/link"):
        with pytest.raises(OSError, match="A symbolic link in a store"):
            store.read(name, 9)
        for write in (store.write, store.create):
            with pytest.raises(OSError, match="A symbolic link in a store"):
                write(name, b"2")
        with pytest.raises(OSError, match="A symbolic link in a store"):
            store.delete(name)
    assert store.list("") == ["a/real"]
    assert (tmp_path / "outside" / "x").read_bytes() == b"secret"


def test_store_may_itself_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    FolderStore(tmp_path / "link").write("a", b"1")
    assert FolderStore(tmp_path / "real").read("a", 9) == b"1"


def test_other_files_are_no_objects(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.write("a", b"1")
    for name in (".hidden", "two words", "-x"):
        (tmp_path / "store" / name).touch()
    os.mkfifo(tmp_path / "store" / "pipe")
    assert store.list("") == ["a"]
    with pytest.raises(OSError, match="Not a regular file"):
        store.read("pipe", 9)


def test_folder_is_made_but_not_the_one_that_holds_it(tmp_path: Path) -> None:
    missing = FolderStore(tmp_path / "no" / "store")
    assert missing.read("a", 9) is None
    assert missing.list("") == []
    with pytest.raises(FileNotFoundError):
        missing.write("a", b"1")
    assert not (tmp_path / "no").exists()


def test_old_leftovers_go_where_locks_tell_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "is_local", lambda _path: False)
    store = FolderStore(tmp_path / "store")
    store.write("a", b"1")
    old, young = (tmp_path / "store" / f".object.{n}{fs.UNLOCKED}" for n in (1, 2))
    for left in (old, young):
        left.mkdir()
        (left / "new").touch()
    two_days_ago = time.time() - 2 * folder_module._ABANDONED_SECONDS
    os.utime(old, (two_days_ago, two_days_ago))
    store.write("a", b"2")
    assert leftovers(tmp_path / "store") == [young.name]


def test_addresses_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {open_store(one).name for one in (tmp_path / "s", "s", f"file://{tmp_path}/s")}
    assert names == {str(tmp_path / "s")}


def test_a_folder_that_may_not_be_written_is_named_by_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))

    store = FolderStore(tmp_path / "store")
    monkeypatch.setattr("os.link", refused)
    with pytest.raises(PermissionError) as found:
        store.create("versions/0000000001.json", b"x")
    assert found.value.filename == str(tmp_path / "store" / "versions" / "0000000001.json")
    assert "0000000001.json'" in str(found.value)
    assert "object" not in str(found.value)
