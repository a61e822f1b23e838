"""Every failure gives one sentence that says what to do, and leaves no output. The next call works."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from helpers import assert_same_files, noise, write_file
from hub.hub_helpers import BASE, TOKEN, TUNED, Person, files_of, publish, save_delta
from hub.hub_server import LoopbackHub
from hub.hub_state import Blob

from sparsedelta.errors import AccessDenied, RemoteError, Unreachable
from sparsedelta.hub.errors import remote_errors, translated
from sparsedelta.hub.folders import remove_damaged
from sparsedelta.hub.references import Reference
from sparsedelta.redaction import redacted

SHARD = "model-00001-of-00002.safetensors"
NOW = {"Retry-After": "0"}


def large_file(hub: LoopbackHub, repo_id: str, path: str) -> str:
    """Return a pattern that matches the address of a large file."""
    return f"/cdn/{hub.state.head(repo_id).files[path].sha256}"


def assert_nothing_left(person: Person) -> None:
    """Check that there is no output and no part of one."""
    assert {place.name for place in person.folder.iterdir()} <= {"home", ".cache"}


def test_gated_base(other: Person, hub: LoopbackHub, pushed: str) -> None:
    hub.state.repos[BASE].gated = True
    error = other.bad("pull", TUNED, "out")
    assert "the base of 'me/tuned' is not available: repository 'org/model' is gated" in error
    assert "accept its license" in error
    assert_nothing_left(other)
    hub.state.accepted.add(BASE)
    other.token = TOKEN
    other.good("pull", TUNED, "out")


def test_gated_delta(other: Person, hub: LoopbackHub, pushed: str) -> None:
    hub.state.repos[TUNED].gated = True
    assert "repository 'me/tuned' is gated" in other.bad("pull", TUNED, "out")


def test_private_base_and_wrong_token(other: Person, hub: LoopbackHub, pushed: str) -> None:
    hub.state.repos[BASE].private = True
    assert "or it is private" in other.bad("pull", TUNED, "out")
    other.token = "hf_wrong"
    error = other.bad("pull", TUNED, "out")
    assert "does not accept the token" in error
    assert "hf_wrong" not in error


def test_commit_of_the_base_that_was_deleted(
    other: Person, hub: LoopbackHub, pushed: str, base_commit: str
) -> None:
    repo = hub.state.repos[BASE]
    repo.branches["main"] = next(iter(repo.commits))
    del repo.commits[base_commit]
    error = other.bad("pull", TUNED, "out")
    assert f"repository 'org/model' has no revision '{base_commit}'" in error
    assert "give a local copy as the base" in error
    assert_nothing_left(other)


def test_other_content_of_the_right_size_is_found_and_removed(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    content = bytearray(hub.state.head(BASE).files[SHARD].data)
    content[-1] ^= 1
    hub.fail("GET", large_file(hub, BASE, SHARD), body=bytes(content))
    error = other.bad("pull", TUNED, "out")
    assert "was damaged and has been removed; run this again" in error
    assert_nothing_left(other)
    hub.requests.clear()
    other.good("pull", TUNED, "out")
    assert_same_files(checkpoints[1], other.folder / "out")
    assert hub.count("GET", "/cdn/") == 1


def test_damaged_delta_is_found_and_removed(other: Person, hub: LoopbackHub, pushed: str) -> None:
    content = bytearray(hub.state.head(TUNED).files["delta.sd"].data)
    content[-1] ^= 1
    hub.fail("GET", large_file(hub, TUNED, "delta.sd"), body=bytes(content))
    assert "was damaged and has been removed" in other.bad("pull", TUNED, "out")
    other.good("pull", TUNED, "out")


def test_dropped_connection_resumes_within_the_call(
    me: Person, other: Person, hub: LoopbackHub
) -> None:
    # The client writes 10 MiB at a time, so smaller files cannot be resumed.
    large = noise("F32", 6 << 20)
    write_file(me.folder / "large/model.safetensors", {"w": large})
    write_file(me.folder / "large2/model.safetensors", {"w": large.changed(7)})
    publish(hub, "org/large", me.folder / "large")
    delta = save_delta(me.folder / "large", me.folder / "large2", me.folder / "large.sd")
    me.good("push", delta, TUNED, "--base-id", "org/large", "--base", me.folder / "large")
    pattern = large_file(hub, "org/large", "model.safetensors")
    hub.fail("GET", pattern, cut_after=0.6)
    hub.requests.clear()
    other.good("pull", TUNED, "out")
    assert_same_files(me.folder / "large2", other.folder / "out")
    first, second = (r for r in hub.requests if r.method == "GET" and pattern in r.path)
    assert 10 << 20 < first.n_sent < len(large.data)
    assert second.headers["range"] == f"bytes={10 << 20}-"


def test_connection_that_keeps_dropping(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    hub.fail("GET", large_file(hub, BASE, SHARD), cut_after=0.0, times=99)
    error = other.bad("pull", TUNED, "out")
    assert "broke off" in error
    assert "run this again" in error
    assert_nothing_left(other)
    hub.faults.clear()
    hub.requests.clear()
    other.good("pull", TUNED, "out")
    assert_same_files(checkpoints[1], other.folder / "out")
    assert hub.count("GET", "/cdn/") == 1  # complete files are not downloaded again


@pytest.mark.parametrize("status", [503, 429])
def test_requests_to_a_busy_hub_are_repeated(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path], status: int
) -> None:
    for method, path in (
        ("GET", f"/api/models/{TUNED}"),
        ("GET", f"/api/models/{BASE}/revision/"),
        ("HEAD", f"/{BASE}/resolve/.*{SHARD}"),
    ):
        hub.fail(method, path, status=status, headers=NOW)
    other.good("pull", TUNED, "out")
    assert_same_files(checkpoints[1], other.folder / "out")
    assert not any(fault.times for fault in hub.faults)


def test_too_many_requests(other: Person, hub: LoopbackHub, pushed: str) -> None:
    hub.fail("GET", "/api/models/", status=429, headers=NOW, times=99)
    error = other.bad("pull", TUNED, "out")
    assert "accepts no more requests for now; wait a few minutes" in error
    assert_nothing_left(other)


def test_hub_that_fails(other: Person, hub: LoopbackHub, pushed: str) -> None:
    hub.fail("GET", "/api/models/", status=502, headers=NOW, times=99)
    assert "the Hub failed with HTTP 502" in other.bad("pull", TUNED, "out")


def test_push_does_not_take_the_cache_for_the_repository(
    me: Person, hub: LoopbackHub, delta: Path, pushed: str
) -> None:
    me.good("pull", TUNED, "out")
    hub.state.add_commit(TUNED, {"README.md": b"My own words.\n"})
    me.good("pull", TUNED, "out", "--overwrite")
    hub.fail("GET", f"/api/models/{TUNED}/revision/", status=502, headers=NOW, times=99)
    assert "the Hub failed with HTTP 502" in me.bad("push", delta, TUNED, "--base-id", BASE)
    assert hub.state.head(TUNED).files["README.md"].data == b"My own words.\n"


def test_slow_hub(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    hub.fail("GET", large_file(hub, BASE, SHARD), seconds=2)
    done = other.run("pull", TUNED, "out", HF_HUB_DOWNLOAD_TIMEOUT="1")
    if done.returncode:  # clients before 1.33 do not repeat this request
        assert "broke off: timed out; run this again" in done.stderr
        assert_nothing_left(other)
    other.good("pull", TUNED, "out", "--overwrite")
    assert_same_files(checkpoints[1], other.folder / "out")


def test_upload_that_breaks_off(me: Person, hub: LoopbackHub, delta: Path) -> None:
    hub.fail("POST", "/commit/", status=500, headers=NOW)
    error = me.bad("push", delta, TUNED, "--base-id", BASE)
    assert "the Hub failed with HTTP 500" in error
    assert {*hub.state.head(TUNED).files} == {".gitattributes"}
    me.good("push", delta, TUNED, "--base-id", BASE)
    assert "delta.sd" in hub.state.head(TUNED).files


def test_names_that_lead_out_of_the_folder(other: Person, hub: LoopbackHub, pushed: str) -> None:
    repo = hub.state.repos[TUNED]
    head = hub.state.head(TUNED)
    blob = head.files["delta.sd"]
    repo.commit("main", {"delta.sd": None, "../../../evil/delta.sd": blob}, "Evil")
    error = other.bad("pull", TUNED, "out")
    assert "file '../../../evil/delta.sd' of repository 'me/tuned' is not a plain relative" in error
    assert_nothing_left(other)


def test_record_with_such_a_name(other: Person, hub: LoopbackHub, pushed: str) -> None:
    head = hub.state.head(TUNED)
    evil = head.files["delta.base.json"].data.replace(b'"tokenizer.json"', b'"../../evil.json"')
    hub.state.add_commit(TUNED, {"delta.base.json": evil})
    assert "path '../../evil.json' in 'delta.base.json'" in other.bad("verify", TUNED)


def test_base_without_a_file_it_should_have(
    other: Person, hub: LoopbackHub, pushed: str, base_commit: str
) -> None:
    files = dict(hub.state.head(BASE).files)
    hub.state.add_repo("them/part", {})
    parts: dict[str, Blob | None] = {p: b for p, b in files.items() if p != "tokenizer.json"}
    hub.state.repos["them/part"].commit("main", parts, "Part")
    error = other.bad("pull", TUNED, "out", "--base", "them/part")
    assert "has no file 'tokenizer.json'" in error


def test_tokens_are_sent_only_to_the_hub(me: Person, hub: LoopbackHub, delta: Path) -> None:
    shown = me.run("--debug", "push", delta, TUNED, "--base-id", BASE, "--private")
    shown2 = me.run("pull", TUNED, "out")
    inspected = me.run("inspect", TUNED)
    assert [shown.returncode, shown2.returncode, inspected.returncode] == [0, 0, 0]
    for done in (shown, shown2, inspected):
        assert TOKEN not in done.stdout + done.stderr
    for request in hub.requests:
        assert TOKEN not in request.path
        if "/cdn/" in request.path:
            assert request.host == "localhost"
            assert "authorization" not in request.headers
    assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in hub.requests)
    for blob in hub.state.head(TUNED).files.values():
        assert TOKEN.encode() not in blob.data
    assert TOKEN.encode() not in b"".join(files_of(me.folder / "out").values())


def test_tokens_in_settings_are_not_shown_in_cards() -> None:
    assert redacted(f"key {TOKEN}, Bearer abc.def") == "key [token], [token]"


def test_client_that_is_not_installed(other: Person, base_commit: str) -> None:
    script = (
        "import sys\nsys.modules['huggingface_hub'] = None\n"
        "from sparsedelta.cli import main\nmain(['inspect', 'me/tuned'])"
    )
    done = other.python("-c", script)
    assert done.returncode == 1
    assert "pip install 'sparsedelta[hub]'" in done.stderr


def test_full_disk() -> None:
    with (
        pytest.raises(OSError, match="no space left for downloads; free some space") as caught,
        remote_errors(Reference("org/model")),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert not isinstance(caught.value, RemoteError)


def test_other_errors_are_not_translated() -> None:
    about = Reference("org/model")
    assert translated(PermissionError(errno.EACCES, "Permission denied"), about) is None
    assert translated(TypeError("a bug"), about) is None
    with pytest.raises(Unreachable), remote_errors(about):
        raise Unreachable("ours")
    assert AccessDenied.code == "access_denied"


def test_damaged_copies_of_the_base_are_found_by_push_and_diff(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    """A diff would record the damage as the base's bits, or as the target's."""
    me.good("push", delta, TUNED, "--base-id", BASE)
    (shard,) = (me.folder / "home" / "hub").glob(f"models--org--model/snapshots/*/{SHARD}")
    for command in (
        ("push", delta, "me/other", "--base-id", BASE),
        ("diff", BASE, checkpoints[1], "-o", "new.sd"),
        ("diff", checkpoints[1], BASE, "-o", "new.sd"),
    ):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.resolve().write_bytes(content)
        assert "was damaged and has been removed; run this again" in me.bad(*command)
        me.good(*command)
        (me.folder / "new.sd").unlink(missing_ok=True)


def test_a_damaged_copy_that_two_files_share(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"damaged")
    links = [tmp_path / "one", tmp_path / "other"]
    for link in links:
        link.symlink_to(blob)
    assert remove_damaged(links) == links[:1]
    assert not any(link.is_symlink() for link in links)


def test_offline_after_a_damaged_delta_was_removed(
    other: Person, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    other.good("pull", TUNED, "out")
    (delta,) = (other.folder / "home" / "hub").glob("models--me--tuned/snapshots/*/delta.sd")
    delta.resolve().write_bytes(b"")
    other.offline = True
    assert "was damaged and has been removed" in other.bad("pull", TUNED, "again")
    assert "explain unreachable" in other.bad("pull", TUNED, "again")
