"""``pull``: it rebuilds the target, downloads only what is needed, and works from the cache."""

from __future__ import annotations

from pathlib import Path

from helpers import assert_same_files, noise, write, write_file
from hub.hub_helpers import BASE, TUNED, Person, files_of, make_tensors, publish, save_delta
from hub.hub_server import LoopbackHub


def downloaded(person: Person, repo_id: str) -> set[str]:
    """Return the names of a repository's files in a person's cache."""
    folder = person.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    return {place.name for place in folder.rglob("*") if place.is_file()}


def test_only_what_is_needed_is_downloaded(
    other: Person, hub: LoopbackHub, pushed: str, base_commit: str, checkpoints: tuple[Path, Path]
) -> None:
    found = other.json("pull", TUNED, "out")
    assert_same_files(checkpoints[1], other.folder / "out")
    assert found == {
        "out": "out",
        "delta": f"hf://{TUNED}/delta.sd@{pushed}",
        "applied": [f"hf://{TUNED}/delta.sd@{pushed}"],
        "base": f"{BASE}@{base_commit}",
        "kept_delta": None,
    }
    assert downloaded(other, BASE) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    # The Hub counts downloads of config.json.
    assert downloaded(other, TUNED) == {"delta.sd", "config.json"}


def test_shards_that_the_delta_does_not_name_are_not_downloaded(
    me: Person, other: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path]
) -> None:
    shard = checkpoints[1] / "model-00001-of-00002.safetensors"
    part = write(me.folder / "part/model.safetensors", shard.read_bytes()).parent
    delta = save_delta(checkpoints[0], part, me.folder / "part.sd", base_id=BASE)
    hub.state.add_repo("me/part", {"delta.sd": delta.read_bytes()})
    other.good("pull", "me/part", "out")
    assert_same_files(part, other.folder / "out")
    assert downloaded(other, BASE) == {shard.name}


def test_delta_that_takes_nothing_from_its_base(
    me: Person, other: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path]
) -> None:
    new = write_file(me.folder / "new/model.safetensors", {"new": noise("F32", 9)}).parent
    delta = save_delta(checkpoints[0], new, me.folder / "new.sd", base_id=BASE)
    hub.state.add_repo("me/new", {"delta.sd": delta.read_bytes()})
    other.good("pull", "me/new", "out")
    assert_same_files(new, other.folder / "out")
    assert downloaded(other, BASE) == set()


def test_base_with_its_tensors_in_other_files(
    me: Person, other: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path]
) -> None:
    layers, rest = make_tensors()
    whole = write_file(me.folder / "whole/weights.safetensors", layers | rest).parent
    tuned = layers | {"norm.bias": rest["norm.bias"].changed(0)}
    target = write_file(me.folder / "one/model.safetensors", tuned).parent
    delta = save_delta(checkpoints[0], target, me.folder / "one.sd", base_id=BASE)
    hub.state.add_repo("me/one", {"delta.sd": delta.read_bytes()})
    publish(hub, "them/whole", whole)
    for name in ("out", "again"):
        other.good("pull", "me/one", name, "--base", "them/whole")
        assert_same_files(target, other.folder / name)
        assert downloaded(other, "them/whole") == {"weights.safetensors"}
        other.offline = True


def test_again_from_the_cache_and_offline(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    other.good("pull", TUNED, "out")
    hub.requests.clear()
    other.good("pull", TUNED, "again")
    assert hub.sent("/cdn/") == 0
    hub.requests.clear()
    other.offline = True
    other.good("pull", TUNED, "offline")
    assert hub.requests == []
    for name in ("again", "offline"):
        assert_same_files(checkpoints[1], other.folder / name)
    assert "offline); run this once with a connection" in other.bad("pull", "me/unknown", "x")


def test_pull_from_the_cache_without_a_connection(
    other: Person, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    other.good("pull", TUNED, "out")
    other.good("pull", TUNED, "again", HF_ENDPOINT="http://127.0.0.1:9")
    assert_same_files(checkpoints[1], other.folder / "again")
    error = other.bad("pull", "me/unknown", "x", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in error


def test_with_a_local_base_no_base_is_downloaded(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    hub.state.repos.pop(BASE)
    other.good("pull", TUNED, "out", "--base", checkpoints[0])
    assert_same_files(checkpoints[1], other.folder / "out")
    assert hub.count("GET", BASE) == 0


def test_local_folder_that_is_not_the_base(
    other: Person, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    error = other.bad("pull", TUNED, "out", "--base", checkpoints[1])
    assert "already is this delta's target" in error
    assert not (other.folder / "out").exists()


def test_base_of_another_repository(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    hub.state.repos.pop(BASE)
    error = other.bad("pull", TUNED, "out")
    assert "the base of 'me/tuned' is not available: there is no repository 'org/model'" in error
    assert "give a local copy as the base" in error
    commit = publish(hub, "them/mirror", checkpoints[0])
    assert other.json("pull", TUNED, "out", "--base", "them/mirror")["base"] == (
        f"them/mirror@{commit}"
    )


def test_revisions_of_delta_and_base_are_independent(
    me: Person,
    other: Person,
    hub: LoopbackHub,
    checkpoints: tuple[Path, Path],
    base_commit: str,
    pushed: str,
) -> None:
    moved = hub.state.add_commit(BASE, {"README.md": b"new words"}).oid
    same = save_delta(checkpoints[0], checkpoints[0], me.folder / "same.sd")
    me.good("push", same, TUNED, "--base-id", f"{BASE}@{base_commit[:10]}", "--tag", "v2")
    found = other.json("pull", TUNED, "old", "--revision", pushed)
    assert found["base"] == f"{BASE}@{base_commit}"
    assert_same_files(checkpoints[1], other.folder / "old")
    found = other.json("pull", f"{TUNED}@v2", "new", "--base-revision", "main")
    assert found["base"] == f"{BASE}@{moved}"
    assert_same_files(checkpoints[0], other.folder / "new")
    error = other.bad("pull", TUNED, "x", "--base-revision", "gone")
    assert "repository 'org/model' has no revision 'gone'" in error
    assert "repository 'me/tuned' has no revision 'gone'" in other.bad(
        "pull", TUNED, "x", "--revision", "gone"
    )


def test_keep_delta(other: Person, hub: LoopbackHub, pushed: str) -> None:
    other.good("pull", TUNED, "out", "--keep-delta")
    kept = (other.folder / "out.sd").read_bytes()
    assert kept == hub.state.head(TUNED).files["delta.sd"].data


def test_output_that_exists(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    (other.folder / "out").mkdir()
    assert "output 'out' exists" in other.bad("pull", TUNED, "out")
    assert hub.requests == []
    other.good("pull", TUNED, "out", "--overwrite")
    assert_same_files(checkpoints[1], other.folder / "out")


def test_moved_base_is_found(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    hub.state.repos["org/renamed"] = hub.state.repos.pop(BASE)
    hub.state.moved[BASE] = "org/renamed"
    other.good("pull", TUNED, "out")
    assert_same_files(checkpoints[1], other.folder / "out")


def test_wrong_arguments(other: Person, hub: LoopbackHub, pushed: str) -> None:
    assert "is not a repository" in other.bad("pull", "tuned", "out")
    assert "both name a revision" in other.bad("pull", f"{TUNED}@main", "out", "--revision", "v1")
    assert "cannot be given together" in other.bad(
        "pull", TUNED, "out", "--base", "x", "--base-revision", "main"
    )
    assert "is not a model repository" in other.bad("pull", "hf://datasets/me/x", "out")
    assert hub.requests == []


def test_repository_without_a_delta(other: Person, base_commit: str) -> None:
    assert f"'{BASE}@{base_commit}' holds no delta" in other.bad("pull", BASE, "out")


def test_from_python(other: Person, pushed: str, checkpoints: tuple[Path, Path]) -> None:
    script = f"import sparsedelta; print(sparsedelta.pull('{TUNED}', 'out').base)"
    done = other.python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(BASE)
    assert_same_files(checkpoints[1], other.folder / "out")


def test_a_folder_of_the_cache_that_holds_more_weights(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE)
    script = f"from huggingface_hub import snapshot_download; snapshot_download('{BASE}')"
    assert me.python("-c", script).returncode == 0
    assert "consolidated.safetensors" in downloaded(me, BASE)
    me.good("pull", TUNED, "out")
    assert_same_files(checkpoints[1], me.folder / "out")
    assert files_of(me.folder / "out").keys() == files_of(checkpoints[1]).keys()
