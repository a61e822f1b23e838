"""``push``: one commit with a card, after the proof of the base; it never overwrites other commits."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from helpers import assert_same_files, noise, write_file, write_sharded
from hub.hub_helpers import (
    BASE,
    INFO,
    TOKEN,
    TUNED,
    Person,
    files_of,
    make_tensors,
    publish,
    save_delta,
)
from hub.hub_server import LoopbackHub

import sparsedelta

FILES = {"README.md", "config.json", "delta.base.json", "delta.png", "delta.sd"}
WRITES = ("POST", "PUT", "DELETE")


def writes(hub: LoopbackHub) -> list[str]:
    """Return the requests to the Hub that write."""
    return [f"{r.method} {r.path}" for r in hub.requests if r.method in WRITES]


def card_of(hub: LoopbackHub, repo_id: str = TUNED) -> str:
    return hub.state.head(repo_id).files["README.md"].data.decode()


def head_of_card(card: str) -> dict[str, object]:
    head: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return head


def test_a_password_of_the_endpoint_is_not_published(
    me: Person, hub: LoopbackHub, delta: Path, base_commit: str
) -> None:
    login = base64.b64encode(b"me:hunter22").decode()
    hub.state.users[f"Basic {login}"] = "me"  # a Hub that also asks for a password
    endpoint = hub.url.replace("://", "://me:hunter22@")
    shown = me.good("push", delta, TUNED, "--base-id", BASE, HF_ENDPOINT=endpoint)
    assert f"{hub.url}/{TUNED}" in shown
    assert "hunter22" not in shown
    for name, file in hub.state.head(TUNED).files.items():
        assert b"hunter22" not in file.data, name
    assert f"{hub.url}/{BASE}" in card_of(hub)


def test_first_push(me: Person, hub: LoopbackHub, delta: Path, base_commit: str) -> None:
    shown = me.good("push", delta, TUNED, "--base-id", BASE)
    head = hub.state.head(TUNED)
    assert len(hub.state.repos[TUNED].commits) == 2
    assert {*head.files} == FILES | {".gitattributes"}
    assert head.message == "Push delta.sd with sparsedelta"
    assert f"base: {BASE}@{base_commit}, verified with a downloaded copy" in shown
    assert head.oid in shown
    assert b'"tuned"' in head.files["config.json"].data
    pushed = me.folder / "pushed.sd"
    pushed.write_bytes(head.files["delta.sd"].data)
    with sparsedelta.load(pushed) as found:
        assert found.base.id == f"{BASE}@{base_commit}"
    record = json.loads(head.files["delta.base.json"].data)
    assert record["base"] == f"{BASE}@{base_commit}"
    assert [file["path"] for file in record["files"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_card(me: Person, hub: LoopbackHub, delta: Path) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE)
    card = card_of(hub)
    assert head_of_card(card) == {
        "base_model": BASE,
        "base_model_relation": "finetune",
        "language": ["en"],
        "library_name": "sparsedelta",
        "license": "other",
        "license_link": f"{hub.url}/{BASE}/blob/main/LICENSE",
        "license_name": "model-license",
        "pipeline_tag": "text-generation",
        "tags": ["sparsedelta", "sparse-delta"],
    }
    assert "# tuned\n" in card
    assert "kB instead of 41.5 kB**" in card
    assert "| changed | 9 of 19,440 values (0.046 %) |" in card
    assert "![Density of the changes by layer and kind of tensor](delta.png)" in card
    assert "| `model.layers.*.q_proj.weight` | 9 | 9,216 | 0.098 % |" in card
    assert "| `sift.rate` | `0.01` |" in card
    assert f"| `steps` | `{INFO['steps']}` |" in card
    assert "sparsedelta pull me/tuned tuned/ " in card
    assert 'sparsedelta.pull("me/tuned", "tuned")' in card


def test_second_push_makes_no_commit(me: Person, hub: LoopbackHub, delta: Path) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE)
    before = hub.state.head(TUNED)
    hub.requests.clear()
    assert "nothing to push" in me.good("push", delta, TUNED, "--base-id", BASE)
    assert hub.state.head(TUNED) == before
    assert writes(hub) == []
    assert hub.sent("/cdn/") == 0  # the base is verified with the cached copy


def test_dry_run_sends_nothing(me: Person, hub: LoopbackHub, delta: Path) -> None:
    shown = me.good("push", delta, TUNED, "--base-id", BASE, "--dry-run")
    assert TUNED not in hub.state.repos
    assert writes(hub) == []
    for name in FILES:
        assert f"  {name}: " in shown
    me.good("push", delta, TUNED, "--base-id", BASE)
    assert card_of(hub) in shown


def test_text_outside_the_marks_is_kept(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE)
    edited = card_of(hub).replace("# tuned\n", "# Mine\n\nI made this.\n").replace("steps", "STEPS")
    edited = edited.replace("pipeline_tag: text-generation", "pipeline_tag: other # mine")
    hub.state.add_commit(TUNED, {"README.md": (edited + "\nThanks to all.\n").encode()})
    other = save_delta(*checkpoints, me.folder / "other.sd", info={"steps": 7})
    me.good("push", other, TUNED, "--base-id", BASE)
    card = card_of(hub)
    assert "# Mine\n\nI made this.\n" in card
    assert card.endswith("\nThanks to all.\n")
    assert "pipeline_tag: other # mine\n" in card
    assert "| `steps` | `7` |" in card
    assert "STEPS" not in card
    assert card.count("<!-- sparsedelta: begin delta.sd -->") == 1


def test_a_card_without_marks_gets_the_section(me: Person, hub: LoopbackHub, delta: Path) -> None:
    text = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Old\n\nWords.\n"
    hub.state.add_repo(TUNED, {"README.md": text.encode()})
    me.good("push", delta, TUNED, "--base-id", BASE)
    card = card_of(hub)
    head = head_of_card(card)
    assert head["license"] == "mit"
    assert head["tags"] == ["mine", "sparsedelta"]
    assert head["base_model"] == BASE
    assert card.index("Words.") < card.index("<!-- sparsedelta: begin delta.sd -->")


def test_a_concurrent_push_is_a_conflict(me: Person, hub: LoopbackHub, delta: Path) -> None:
    hub.state.add_repo(TUNED, {"notes.txt": b"1"})
    hub.fail("POST", "/preupload/", action=lambda: hub.state.add_commit(TUNED, {"notes.txt": b"2"}))
    error = me.bad("push", delta, TUNED, "--base-id", BASE)
    assert "somebody else changed repository 'me/tuned' in the meantime" in error
    assert {*hub.state.head(TUNED).files} == {".gitattributes", "notes.txt"}
    me.good("push", delta, TUNED, "--base-id", BASE)
    assert hub.state.head(TUNED).files["notes.txt"].data == b"2"


def test_wrong_base_is_found_before_anything_is_sent(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    files = files_of(checkpoints[0])
    shard = bytearray(files["model-00002-of-00002.safetensors"])
    shard[-1] ^= 1
    hub.state.add_repo("org/other", {**files, "model-00002-of-00002.safetensors": bytes(shard)})
    hub.state.add_repo("org/target", files_of(checkpoints[1]))
    error = me.bad("push", delta, TUNED, "--base-id", "org/other")
    assert "tensor 'norm.bias' has digest" in error
    assert "is the delta's target, expected its base" in me.bad(
        "push", delta, TUNED, "--base-id", "org/target"
    )
    assert writes(hub) == []
    assert TUNED not in hub.state.repos


def test_base_of_another_structure_is_not_downloaded(
    me: Person, hub: LoopbackHub, delta: Path
) -> None:
    write_sharded(me.folder / "large", [{"embed.weight": noise("F32", 300_000)}])
    files = files_of(me.folder / "large")
    hub.state.add_repo("org/other", {**files, "tokenizer.json": b"[]"})
    error = me.bad("push", delta, TUNED, "--base-id", "org/other")
    assert "is another model than the base that the delta was made from" in error
    assert 0 < hub.sent("/cdn/") < 150_000
    assert writes(hub) == []


def test_local_base_saves_the_download(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    shown = me.good("push", delta, TUNED, "--base-id", BASE, "--base", checkpoints[0])
    assert "verified with the local copy" in shown
    assert sum(r.n_sent for r in hub.requests if r.method == "GET" and "/cdn/" in r.path) == 0


def test_local_base_must_be_what_the_hub_has(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    shard = checkpoints[0] / "model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    error = me.bad("push", delta, TUNED, "--base-id", BASE, "--base", checkpoints[0])
    assert "is not the file 'model-00002-of-00002.safetensors' of 'org/model@" in error
    assert writes(hub) == []


def test_other_files_of_the_local_base_prove_nothing(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    layers, rest = make_tensors()
    one = save_delta(
        checkpoints[0],
        write_file(me.folder / "one/model.safetensors", layers | rest).parent,
        me.folder / "one.sd",
    )
    moved = write_file(me.folder / "moved/model.safetensors", layers | rest).parent
    publish(hub, "org/moved", moved)
    me.good("push", one, "me/one", "--base-id", "org/moved")
    record = json.loads(hub.state.head("me/one").files["delta.base.json"].data)
    assert [file["path"] for file in record["files"]] == ["model.safetensors"]
    assert "has the 1 file verified" in me.good("verify", "me/one")
    # The folder holds the base, but not in the one file that the repository has.
    wrong = layers | {
        "embed.weight": rest["embed.weight"].changed(0),
        "norm.bias": rest["norm.bias"],
    }
    publish(hub, "org/wrong", write_file(me.folder / "wrong/model.safetensors", wrong).parent)
    write_file(checkpoints[0] / "model.safetensors", wrong)
    error = me.bad("push", one, "me/two", "--base-id", "org/wrong", "--base", checkpoints[0])
    assert "tensor 'embed.weight' has digest" in error
    assert "me/two" not in hub.state.repos


def test_base_with_newer_commits_keeps_its_pin(
    me: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path], base_commit: str
) -> None:
    delta = save_delta(*checkpoints, me.folder / "d.sd", base_id=f"{BASE}@{base_commit}")
    hub.state.add_commit(BASE, {"README.md": b"new words"})
    for more in ((), ("--base-id", BASE)):
        assert f"base: {BASE}@{base_commit}," in me.good("push", delta, TUNED, *more)
    unnamed = save_delta(*checkpoints, me.folder / "unnamed.sd")
    for more in ((), ("--base-id", BASE)):  # the record in the repository names the base
        assert "nothing to push" in me.good("push", unnamed, TUNED, *more)
    assert len(hub.state.repos[TUNED].commits) == 2


def test_several_deltas_in_one_repository(
    me: Person, other: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path]
) -> None:
    base, target = checkpoints
    for name, info in (("sql", {"task": "sql"}), ("chat", {"task": "chat"})):
        path = save_delta(base, target, me.folder / f"{name}.sd", info=info)
        me.good("push", path, TUNED, "--base-id", BASE, "--subfolder", name)
    card = card_of(hub)
    assert {path for path in hub.state.head(TUNED).files if path.endswith(".sd")} == {
        "sql/delta.sd",
        "chat/delta.sd",
    }
    assert "sparsedelta pull hf://me/tuned/sql sql/" in card
    assert 'sparsedelta.pull("me/tuned", "chat", subfolder="chat")' in card
    assert "](sql/delta.png)" in card
    assert head_of_card(card)["base_model"] == BASE
    error = other.bad("pull", TUNED, "out")
    assert "several deltas: chat/delta.sd, sql/delta.sd; choose one" in error
    other.good("pull", TUNED, "out", "--subfolder", "sql")
    other.good("pull", "hf://me/tuned/chat", "out2")
    assert_same_files(target, other.folder / "out")
    assert_same_files(target, other.folder / "out2")
    other.offline = True
    other.good("pull", TUNED, "out3", "--subfolder", "sql")
    assert (
        "is not listed offline; the cache holds: chat/delta.sd, sql/delta.sd; choose"
        in other.bad("pull", TUNED, "out4")
    )


def test_branch_tag_and_pull_request(me: Person, hub: LoopbackHub, delta: Path) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE, "--revision", "dev", "--tag", "v1")
    repo = hub.state.repos[TUNED]
    assert {*repo.commits[repo.branches["main"]].files} == {".gitattributes"}
    assert repo.tags == {"v1": repo.branches["dev"]}
    arguments = ("push", delta, TUNED, "--base-id", BASE)
    shown = me.good(*arguments, "--create-pr", "-m", "Mine", "--commit-description", "More")
    assert f"pull request: {hub.url}/{TUNED}/discussions/1" in shown
    proposed = repo.commits[repo.pull_requests["refs/pr/1"]]
    assert (proposed.message, proposed.description) == ("Mine", "More")
    assert "delta.sd" not in repo.commits[repo.branches["main"]].files
    assert "nothing to push" in me.good(*arguments, "--revision", "refs/pr/1")
    repo.commit("refs/pr/1", {"delta.sd": None}, "Remove")
    me.good(*arguments, "--revision", "refs/pr/1")
    assert "delta.sd" in repo.commits[repo.pull_requests["refs/pr/1"]].files
    assert {*repo.branches} == {"main", "dev"}
    error = me.bad(*arguments, "--tag", "v1")
    assert "already has a tag 'v1'" in error
    assert "a pull request is always opened on 'main'" in me.bad(
        *arguments, "--create-pr", "--revision", "dev"
    )


def test_private(me: Person, other: Person, hub: LoopbackHub, delta: Path) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE, "--private")
    assert hub.state.repos[TUNED].private
    assert "there is no repository 'me/tuned', or it is private" in other.bad("pull", TUNED, "out")
    me.good("pull", TUNED, "out")


def test_base_is_not_known(me: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path]) -> None:
    delta = save_delta(*checkpoints, me.folder / "d.sd", base_id="/home/me/base")
    error = me.bad("push", delta, TUNED)
    assert "names '/home/me/base' as its base, expected a repository; name the base" in error
    assert "--base-id" in error
    assert "is not a repository" in me.bad("push", delta, TUNED, "--base-id", "./base")
    assert "not the name of a repository" in me.bad("push", delta, "tuned", "--base-id", BASE)
    assert writes(hub) == []


@pytest.mark.parametrize(
    ("repo_id", "token", "words"),
    [
        (TUNED, None, "hf auth login"),
        (TUNED, "hf_wrong", "does not accept the token"),
        ("them/tuned", TOKEN, "does not allow this for repository 'them/tuned'"),
    ],
)
def test_no_right_to_write(
    me: Person, hub: LoopbackHub, delta: Path, repo_id: str, token: str | None, words: str
) -> None:
    me.token = token
    error = me.bad("push", delta, repo_id, "--base-id", BASE)
    assert words in error
    assert token is None or token not in error
    assert repo_id not in hub.state.repos


def test_from_python(me: Person, hub: LoopbackHub, delta: Path, base_commit: str) -> None:
    script = (
        "import sparsedelta\n"
        "with sparsedelta.load('delta.sd') as delta:\n"
        f"    report = delta.push_to_hub('{TUNED}', base_id='{BASE}', commit_message='Mine',\n"
        f"        token='{TOKEN}')\n"
        "print(report.commit, report.base, report.committed)\n"
    )
    me.token = None
    done = me.python("-c", script)
    assert done.returncode == 0, done.stderr
    head = hub.state.head(TUNED)
    assert head.message == "Mine"
    assert done.stdout.split() == [head.oid, f"{BASE}@{base_commit}", "True"]


def test_json(me: Person, hub: LoopbackHub, delta: Path) -> None:
    found = me.json("push", delta, TUNED, "--base-id", BASE)
    assert found["commit"] == hub.state.head(TUNED).oid
    assert found["committed"] is True
    assert {file["path"] for file in found["files"]} == FILES


def test_push_beside_weights_keeps_their_configuration(
    me: Person, hub: LoopbackHub, delta: Path
) -> None:
    """The target's config.json would change the model that ``from_pretrained`` loads from that repository."""
    for number, name in enumerate(("pytorch_model.bin", "model.safetensors", "sift.safetensors")):
        repository = f"me/old-{number}"
        hub.state.add_repo(repository, {name: b"\0", "config.json": b"{}"})
        me.good("push", delta, repository, "--base-id", BASE)
        is_kept = hub.state.head(repository).files["config.json"].data == b"{}"
        assert is_kept == (name != "sift.safetensors")  # the state of a training


def test_push_into_the_repository_of_the_base(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    """Its name would mean two things. In a folder, the delta is no base of itself."""
    head = hub.state.head(BASE)
    assert "is the base itself" in me.bad("push", delta, BASE, "--base-id", BASE)
    assert hub.state.head(BASE) is head
    me.good("push", delta, BASE, "--base-id", BASE, "--subfolder", "tuned")
    files = hub.state.head(BASE).files
    assert files["config.json"] == head.files["config.json"]
    assert files["tuned/config.json"].data == (checkpoints[1] / "config.json").read_bytes()
    assert "base_model" not in head_of_card(files["README.md"].data.decode())


def test_a_base_that_has_changed_since_is_told_with_the_way_out(
    me: Person, hub: LoopbackHub, delta: Path, base_commit: str
) -> None:
    hub.state.add_commit(BASE, {"tokenizer.json": b"moved"})
    error = me.bad("push", delta, TUNED, "--base-id", BASE)
    assert f"file '{BASE}@{hub.state.head(BASE).oid}/tokenizer.json' differs" in error
    assert f"name the commit that the delta was made from (base_id='{BASE}@<commit>'" in error
    me.good("push", delta, TUNED, "--base-id", f"{BASE}@{base_commit}")


def test_a_record_of_another_delta_that_cannot_be_read(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    publish(hub, "org/copy", checkpoints[0])
    me.good("push", delta, TUNED, "--base-id", BASE, "--subfolder", "a")
    hub.state.add_commit(TUNED, {"b/delta.sd": b"", "b/delta.base.json": b"{"})
    me.good("push", delta, TUNED, "--base-id", "org/copy", "--subfolder", "a")


def test_a_tag_that_exists_is_found_before_the_commit(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    me.good("push", delta, TUNED, "--base-id", BASE, "--tag", "v1")
    head = hub.state.head(TUNED).oid
    me.good("push", delta, TUNED, "--base-id", BASE, "--tag", "v1")  # the same commit
    other = save_delta(*checkpoints, me.folder / "other.sd", info={"steps": 7})
    hub.requests.clear()
    error = me.bad("push", other, TUNED, "--base-id", BASE, "--tag", "v1")
    assert f"repository 'me/tuned' already has a tag 'v1', at {head[:12]}" in error
    assert writes(hub) == []
    assert hub.state.head(TUNED).oid == head


def test_a_base_that_no_delta_has_any_more_leaves_the_card(
    me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    publish(hub, "org/copy", checkpoints[0])
    me.good("push", delta, TUNED, "--base-id", BASE, "--subfolder", "a")
    me.good("push", delta, TUNED, "--base-id", "org/copy", "--subfolder", "b")
    me.good("push", delta, TUNED, "--base-id", "org/copy", "--subfolder", "c")
    assert head_of_card(card_of(hub))["base_model"] == [BASE, "org/copy"]
    me.good("push", delta, TUNED, "--base-id", BASE, "--subfolder", "b")
    assert head_of_card(card_of(hub))["base_model"] == [BASE, "org/copy"]
    me.good("push", delta, TUNED, "--base-id", BASE, "--subfolder", "c")
    card = card_of(hub)
    assert head_of_card(card)["base_model"] == BASE
    for name in "abc":  # each has an output of its own
        assert f"sparsedelta pull hf://{TUNED}/{name} {name}/ " in card
        assert f'sparsedelta.pull("{TUNED}", "{name}", subfolder="{name}")' in card


def test_the_card_of_a_single_file_names_a_file(
    me: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path]
) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.state.add_repo("org/single", {name: (checkpoints[0] / name).read_bytes()})
    single = save_delta(checkpoints[0] / name, checkpoints[1] / name, me.folder / "single.sd")
    me.good("push", single, TUNED, "--base-id", "org/single")
    card = card_of(hub)
    assert f"sparsedelta pull {TUNED} tuned.safetensors " in card
    assert "`tuned.safetensors` is then an ordinary weight file." in card
