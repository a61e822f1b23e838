"""Chains: deltas whose base is a delta in a repository. Each link is checked, and cycles are found."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from helpers import assert_same_files, noise, write, write_file
from hub.hub_helpers import BASE, Person, files_of, make_checkpoints, publish, save_delta
from hub.hub_server import LoopbackHub

import sparsedelta


@pytest.fixture
def states(me: Person, checkpoints: tuple[Path, Path]) -> list[Path]:
    """Write a base, a fine-tune of it, and a fine-tune of that; return the three."""
    base, first = checkpoints
    second = me.folder / "second"
    make_checkpoints(second)
    target = second / "target"
    (target / "config.json").write_text("{}")
    (target / "tokenizer.json").write_bytes((first / "tokenizer.json").read_bytes())
    shard = target / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    return [base, first, target]


@pytest.fixture
def chain(me: Person, hub: LoopbackHub, states: list[Path]) -> list[str]:
    """Push the two deltas, the second one to a folder; return the references of both."""
    base, first, second = states
    one = save_delta(base, first, me.folder / "one.sd")
    two = save_delta(first, second, me.folder / "two.sd")
    me.good("push", one, "me/first", "--base-id", BASE)
    shown = me.good("push", two, "me/second", "--base-id", "me/first", "--subfolder", "v2")
    assert "verified with the digests of its target" in shown
    hub.requests.clear()
    return [
        f"hf://me/first/delta.sd@{hub.state.head('me/first').oid}",
        f"hf://me/second/v2/delta.sd@{hub.state.head('me/second').oid}",
    ]


def test_pull_follows_the_chain(
    other: Person, hub: LoopbackHub, chain: list[str], states: list[Path], base_commit: str
) -> None:
    found = other.json("pull", "me/second", "out")
    assert_same_files(states[2], other.folder / "out")
    assert found["applied"] == chain
    assert found["base"] == f"{BASE}@{base_commit}"
    other.offline = True
    other.good("pull", "hf://me/second/v2", "offline")
    assert_same_files(states[2], other.folder / "offline")


def test_card_of_a_link(hub: LoopbackHub, chain: list[str]) -> None:
    card = hub.state.head("me/second").files["README.md"].data.decode()
    assert "base_model: me/first\n" in card
    assert "| base | itself a delta, `me/first` at commit" in card


@pytest.mark.parametrize("number", [0, 1])
def test_local_base_anywhere_in_the_chain(
    other: Person, hub: LoopbackHub, chain: list[str], states: list[Path], number: int
) -> None:
    hub.state.repos.pop(BASE)
    found = other.json("pull", "me/second", "out", "--base", states[number])
    assert_same_files(states[2], other.folder / "out")
    assert found["applied"] == chain[number:]


def test_apply_and_verify_on_a_link(
    me: Person, other: Person, chain: list[str], states: list[Path]
) -> None:
    other.good("apply", "me/first", me.folder / "two.sd", "out")
    assert_same_files(states[2], other.folder / "out")
    assert "has the 1 file verified by push" in other.good("verify", "me/second")


def test_fetched_chain_is_one_delta(
    other: Person, hub: LoopbackHub, chain: list[str], states: list[Path]
) -> None:
    script = (
        "import sparsedelta\nfrom sparsedelta.hub.sources import fetched\n"
        "with fetched('me/second') as (delta, base): sparsedelta.apply(base, delta, 'out')\n"
    )
    done = other.python("-c", script)
    assert done.returncode == 0, done.stderr
    assert_same_files(states[2], other.folder / "out")


def test_a_link_that_was_replaced(
    me: Person, other: Person, hub: LoopbackHub, states: list[Path], chain: list[str]
) -> None:
    other_delta = save_delta(states[0], states[2], me.folder / "other.sd")
    content = other_delta.read_bytes()
    repo = hub.state.repos["me/first"]
    oid = chain[0].rpartition("@")[2]
    files = {**repo.commits[oid].files, "delta.sd": hub.state.blob(content)}
    object.__setattr__(repo.commits[oid], "files", files)
    error = other.bad("pull", "me/second", "out")
    assert "does not have the tensor 'norm.bias' that the next delta was made from" in error
    assert hub.sent("safetensors") == 0


def test_push_on_a_delta_with_another_target(
    me: Person, hub: LoopbackHub, chain: list[str], states: list[Path]
) -> None:
    wrong = save_delta(states[0], states[2], me.folder / "wrong.sd")
    error = me.bad("push", wrong, "me/third", "--base-id", "me/first")
    assert "name the right base" in error
    assert "me/third" not in hub.state.repos


def test_push_on_a_delta_without_digests_of_its_target(
    me: Person, hub: LoopbackHub, states: list[Path]
) -> None:
    base, first, second = states
    with sparsedelta.load(save_delta(base, first, me.folder / "one.sd", base_id=BASE)) as delta:
        rows = (
            row if row.is_copied else dataclasses.replace(row, target=row.target.with_digest(None))
            for row in delta.tensors
        )
        dataclasses.replace(delta, tensors=tuple(rows)).save(me.folder / "unknown.sd")
    hub.state.add_repo("me/unknown", {"delta.sd": (me.folder / "unknown.sd").read_bytes()})
    two = save_delta(first, second, me.folder / "two.sd")
    error = me.bad("push", two, "me/second", "--base-id", "me/unknown")
    assert "does not have the digests of its target" in error
    assert "me/second" not in hub.state.repos


def test_chain_whose_deltas_need_the_same_tensors(
    me: Person, other: Person, hub: LoopbackHub
) -> None:
    a, b, c = (noise("F32", 50, seed=seed) for seed in "abc")
    contents = [{"a": a}, {"a": a, "b": b}, {"a": a, "c": c}]
    base, first, second = (
        write_file(me.folder / f"s{n}/model.safetensors", content).parent
        for n, content in enumerate(contents)
    )
    one = save_delta(base, first, me.folder / "one.sd", base_id="org/small")
    two = save_delta(first, second, me.folder / "two.sd", base_id="me/one")
    publish(hub, "org/small", base)
    hub.state.add_repo("me/one", {"delta.sd": one.read_bytes()})
    hub.state.add_repo("me/two", {"delta.sd": two.read_bytes()})
    assert len(other.json("pull", "me/two", "out")["applied"]) == 2
    assert_same_files(second, other.folder / "out")


def test_a_chain_that_returns_to_earlier_weights_is_not_cyclic(
    me: Person, other: Person, hub: LoopbackHub
) -> None:
    """A delta of the configuration alone, and one that takes an earlier one back."""
    w = noise("F32", 50)
    contents = [(w, "0"), (w, "1"), (w.changed(0), "1"), (w, "1")]
    folders = []
    for number, (weights, config) in enumerate(contents):
        folders.append(me.folder / f"s{number}")
        write_file(folders[-1] / "model.safetensors", {"w": weights})
        write(folders[-1] / "config.json", config)
        write(folders[-1] / "tokenizer.json", "{}")
    publish(hub, "org/first", folders[0])
    below = "org/first"
    for number, (base, target) in enumerate(itertools.pairwise(folders), 1):
        delta = save_delta(base, target, me.folder / f"{number}.sd", base_id=below)
        below = f"me/step-{number}"
        hub.state.add_repo(below, {"delta.sd": delta.read_bytes()})
    assert len(other.json("pull", below, "out")["applied"]) == 3
    assert_same_files(folders[-1], other.folder / "out")
    for number, folder in enumerate(folders[:-1]):  # each is in the chain, by its files too
        out = f"from-{number}"
        other.good("pull", below, out, "--base", folder)
        assert_same_files(folders[-1], other.folder / out)
    lacking = write_file(me.folder / "lacking" / "model.safetensors", {"w": w}).parent
    error = other.bad("pull", below, "from-lacking", "--base", lacking)
    assert "has no files 'config.json', 'tokenizer.json'" in error
    assert "damaged" not in error


def test_cyclic_chains_are_refused(
    me: Person, other: Person, hub: LoopbackHub, states: list[Path]
) -> None:
    base, first, _ = states
    there = save_delta(base, first, me.folder / "there.sd", base_id="me/back")
    back = save_delta(first, base, me.folder / "back.sd", base_id="me/there")
    hub.state.add_repo("me/there", {"delta.sd": there.read_bytes()})
    hub.state.add_repo("me/back", {"delta.sd": back.read_bytes()})
    error = other.bad("pull", "me/there", "out")
    assert "the chain of deltas below 'me/there@" in error
    assert "is cyclic or longer than 64" in error
    same = save_delta(base, base, me.folder / "same.sd", base_id="me/same")
    hub.state.add_repo("me/same", {"delta.sd": same.read_bytes()})
    assert "is cyclic or longer than 64" in other.bad("pull", "me/same", "out")


def test_a_delta_that_names_the_wrong_base(
    me: Person, other: Person, hub: LoopbackHub, states: list[Path], base_commit: str
) -> None:
    with sparsedelta.load(save_delta(states[0], states[1], me.folder / "d.sd")) as delta:
        lied = dataclasses.replace(delta, base=dataclasses.replace(delta.base, id="org/other"))
        lied.save(me.folder / "lied.sd")
    files = files_of(states[1])
    hub.state.add_repo("org/other", files)
    hub.state.add_repo("me/liar", {"delta.sd": (me.folder / "lied.sd").read_bytes()})
    assert "already is this delta's target" in other.bad("pull", "me/liar", "out")
    assert not (other.folder / "out").exists()


def test_pull_with_a_repository_of_the_chain_as_the_base(
    other: Person, hub: LoopbackHub, chain: list[str], states: list[Path], base_commit: str
) -> None:
    """The root, without and with a revision, a link, and a repository that no delta names."""
    hub.state.add_commit(BASE, {"tokenizer.json": b"moved"})
    for number, (base, applied) in enumerate(
        [(BASE, chain), (f"{BASE}@{base_commit}", chain), ("me/first", chain)]
    ):
        found = other.json("pull", "me/second", f"out-{number}", "--base", base)
        assert_same_files(states[2], other.folder / f"out-{number}")
        assert found["applied"] == applied
        assert found["base"] == f"{BASE}@{base_commit}"
    publish(hub, "org/copy", states[1])
    assert other.json("pull", "me/second", "copied", "--base", "org/copy")["applied"] == chain[1:]
    assert_same_files(states[2], other.folder / "copied")
    moved = other.bad("pull", "me/second", "moved", "--base", f"{BASE}@main")
    assert f"file '{BASE}@{hub.state.head(BASE).oid}/tokenizer.json' differs" in moved


def test_what_the_base_lacks_is_named_with_a_command_that_leaves_it_out(
    me: Person, other: Person, chain: list[str], states: list[Path]
) -> None:
    (states[1] / "tokenizer.json").unlink()
    error = other.bad("pull", "me/second", "out", "--base", states[1])
    assert f"get it from the target of {chain[0]}, or rebuild the target without it" in error
    assert "`sparsedelta apply --exclude tokenizer.json`" in error


def test_pull_with_a_folder_of_the_chain_as_the_base(
    me: Person, other: Person, hub: LoopbackHub, states: list[Path]
) -> None:
    """At the commit that the chain names, also after that folder has got another delta."""
    for number, (base, target) in enumerate(itertools.pairwise(states), 1):
        delta = save_delta(base, target, me.folder / f"{number}.sd")
        below = f"hf://me/run/s{number - 1}" if number > 1 else BASE
        me.good("push", delta, "me/run", "--base-id", below, "--subfolder", f"s{number}")
    commit = hub.state.head("me/run").oid
    back = save_delta(states[1], states[0], me.folder / "back.sd")
    me.good("push", back, "me/run", "--base-id", "hf://me/run/s1", "--subfolder", "s3")
    hub.state.add_commit("me/run", {"s1/delta.sd": back.read_bytes()})
    for number, given in enumerate(
        ("hf://me/run/s1", "hf://me/run/s1/delta.sd", "me/run", f"me/run@{commit}")
    ):
        other.good("pull", "hf://me/run/s2", f"out-{number}", "--base", given)
        assert_same_files(states[2], other.folder / f"out-{number}")


@pytest.mark.parametrize("is_junk", [False, True])
def test_pull_with_a_copy_of_the_base_whose_repository_has_moved_on(
    me: Person, other: Person, hub: LoopbackHub, states: list[Path], *, is_junk: bool
) -> None:
    two = save_delta(states[1], states[2], me.folder / "two.sd", base_id="me/first")
    back = save_delta(states[2], states[0], me.folder / "back.sd", base_id="me/second")
    hub.state.add_repo("me/second", {"delta.sd": two.read_bytes()})
    hub.state.add_repo("me/first", {"delta.sd": b"junk" if is_junk else back.read_bytes()})
    publish(hub, "org/copy", states[1])
    other.good("pull", "me/second", "out", "--base", "org/copy")
    assert_same_files(states[2], other.folder / "out")


def test_a_base_that_is_gone_and_complete_in_the_cache(
    other: Person, hub: LoopbackHub, chain: list[str], states: list[Path]
) -> None:
    other.good("pull", "me/second", "out")
    hub.state.repos.pop(BASE)
    other.good("pull", "me/second", "again")
    assert_same_files(states[2], other.folder / "again")
    wrong = write_file(other.folder / "wrong" / "model.safetensors", {"w": noise("F32", 5)}).parent
    hub.state.repos.pop("me/first")
    for file in (other.folder / "home" / "hub").glob("models--me--first/snapshots/*/*"):
        file.unlink()
    error = other.bad("pull", "me/second", "no", "--base", wrong)
    assert "is another model than the base that the delta was made from" in error
    assert "whether it is the base of an earlier delta was not found out" in error


def test_a_base_that_is_gone_and_in_the_cache_in_part(
    other: Person, hub: LoopbackHub, chain: list[str], states: list[Path]
) -> None:
    other.good("pull", "me/second", "out")
    hub.state.repos.pop(BASE)
    for file in (other.folder / "home" / "hub").glob(
        "models--org--model/snapshots/*/tokenizer.json"
    ):
        file.unlink()
    error = other.bad("pull", "me/second", "again")
    assert "there is no repository 'org/model', or it is private" in error
    assert "name the right base" not in error


def test_a_repository_s_own_delta_as_the_base(
    me: Person, other: Person, hub: LoopbackHub, states: list[Path]
) -> None:
    one = save_delta(states[0], states[1], me.folder / "one.sd")
    two = save_delta(states[1], states[2], me.folder / "two.sd")
    me.good("push", one, "me/own", "--base-id", BASE)
    me.good("push", two, "me/own", "--base-id", "me/own")
    assert "nothing to push" in me.good("push", two, "me/own", "--base-id", "me/own")
    other.good("pull", "me/own", "out")
    assert_same_files(states[2], other.folder / "out")
