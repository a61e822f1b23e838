"""A repository in place of a path, and how much of it is downloaded."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_same_files, noise, write_file
from hub.hub_helpers import BASE, TUNED, Person, files_of, publish, save_delta
from hub.hub_server import LoopbackHub

import sparsedelta


def test_apply(
    other: Person, hub: LoopbackHub, pushed: str, base_commit: str, checkpoints: tuple[Path, Path]
) -> None:
    delta = save_delta(*checkpoints, other.folder / "d.sd")
    done = other.run("apply", f"{BASE}@{base_commit[:8]}", delta, "out")
    assert done.stderr.splitlines() == [f"base: {BASE}@{base_commit}", "wrote out"]
    other.good("apply", checkpoints[0], TUNED, "out2")
    other.good("apply", f"hf://{BASE}", f"hf://{TUNED}/delta.sd@{pushed}", "out3")
    for name in ("out", "out2", "out3"):
        assert_same_files(checkpoints[1], other.folder / name)


def test_diff(
    other: Person, hub: LoopbackHub, base_commit: str, checkpoints: tuple[Path, Path]
) -> None:
    publish(hub, "org/tuned", checkpoints[1])
    other.good("diff", BASE, "org/tuned", "-o", "d.sd")
    with sparsedelta.load(other.folder / "d.sd") as delta:
        assert delta.base.id == f"{BASE}@{base_commit}"
        assert delta.nnz == 9
        # All files of the repository except git's own and weights in formats that are not read.
        paths = {file.path for file in delta.target.side_files}
        assert paths == {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    other.good("apply", BASE, "d.sd", "out")
    for path in ("model-00001-of-00002.safetensors", "config.json"):
        assert (other.folder / "out" / path).read_bytes() == (checkpoints[1] / path).read_bytes()


def test_diff_in_python(
    other: Person, hub: LoopbackHub, base_commit: str, checkpoints: tuple[Path, Path]
) -> None:
    """A repository stands on either side, and a path that exists comes first."""
    publish(hub, "org/tuned", checkpoints[1])
    other.good("diff", BASE, "org/tuned", "-o", "d.sd")
    script = f"""
import os, sparsedelta
sparsedelta.diff({BASE!r}, "hf://org/tuned").save("p.sd")
os.rename("local", "org")
sparsedelta.diff({BASE!r}, "org/tuned").save("q.sd")
"""
    shutil.copytree(checkpoints[0], other.folder / "local" / "tuned")
    (other.folder / "script.py").write_text(script)
    done = other.python("script.py")
    assert done.returncode == 0, done.stderr
    assert (other.folder / "p.sd").read_bytes() == (other.folder / "d.sd").read_bytes()
    with sparsedelta.load(other.folder / "q.sd") as delta:
        assert delta.nnz == 0
        assert delta.base.id == f"{BASE}@{base_commit}"


def test_diff_of_what_is_neither_a_path_nor_a_repository(other: Person) -> None:
    (other.folder / "script.py").write_text(
        "import sparsedelta; sparsedelta.diff('org/none', 'org/none')"
    )
    done = other.python("script.py")
    assert "there is no local path 'org/none', and" in done.stderr


def test_diff_does_not_take_a_delta_for_weights(other: Person, pushed: str) -> None:
    error = other.bad("-q", "diff", BASE, TUNED, "-o", "d.sd")
    assert f"'{TUNED}@{pushed}' is a delta, not a checkpoint; pull it first" in error


def test_repository_of_bin_files_gets_the_command_that_converts_it(
    other: Person, hub: LoopbackHub, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    files = {
        "config.json": (tmp_path / "saved" / "config.json").read_bytes(),
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    hub.state.add_repo("org/old", files)
    error = other.bad("diff", "org/old", checkpoints[1], "-o", "d.sd")
    commit = hub.state.head("org/old").oid
    assert f"'org/old@{commit}' holds no .safetensors files; convert it with: python -c" in error
    code = shlex.split(error.partition("with: ")[2])[2]
    assert f'("org/old", revision="{commit}"' in code
    subprocess.run(
        [sys.executable, "-c", code], cwd=other.folder, env=other.environment(), check=True
    )
    with sparsedelta.diff(tmp_path / "saved", other.folder / "old-safetensors") as delta:
        assert delta.nnz == 0
    hub.state.add_repo("org/older", {"net.bin": files["pytorch_model.bin"]})
    error = other.bad("diff", "org/older", checkpoints[1], "-o", "d.sd")
    code = shlex.split(error.partition("with: ")[2])[2]
    subprocess.run(
        [sys.executable, "-c", code], cwd=other.folder, env=other.environment(), check=True
    )
    with sparsedelta.diff(
        tmp_path / "saved" / "model.safetensors", other.folder / "net.safetensors"
    ) as delta:
        assert delta.nnz == 0


def test_inspect_of_a_large_delta_reads_no_more(
    other: Person, hub: LoopbackHub, tmp_path: Path
) -> None:
    tensors = {f"w.{n}": noise("F32", 400_000, seed=n) for n in range(3)}
    base = write_file(tmp_path / "b" / "model.safetensors", tensors)
    target = write_file(
        tmp_path / "t" / "model.safetensors",
        {name: noise("F32", 400_000, seed=name) for name in tensors},
    )
    delta = save_delta(base.parent, target.parent, tmp_path / "large.sd")
    assert delta.stat().st_size > 4_000_000
    hub.state.add_repo("me/large", {"delta.sd": delta.read_bytes()})
    assert "1,200,000 of 1,200,000 elements" in other.good("inspect", "me/large")
    hub.requests.clear()
    found = other.json("inspect", "me/large")
    assert found == {"delta": "me/large", **sparsedelta.inspect(delta).as_json()}
    assert hub.count("GET", "/cdn/") == 1
    assert sum(r.n_sent for r in hub.requests) <= 300_000


def test_verify_downloads_no_weights(
    other: Person, hub: LoopbackHub, pushed: str, base_commit: str
) -> None:
    shown = other.good("verify", TUNED)
    assert f"base: {BASE}@{base_commit} has the 4 files verified by push" in shown
    assert shown.startswith("me/tuned is valid: 9 changed values")
    ranged = [r for r in hub.requests if r.method == "GET" and "safetensors" in r.path]
    assert all("range" in r.headers or "index" in r.path for r in ranged)
    found = other.json("verify", TUNED)
    assert found["remote_base"]["recorded"] is True
    assert found["base_checked"] is False


def test_verify_finds_another_base(
    other: Person, hub: LoopbackHub, pushed: str, base_commit: str, checkpoints: tuple[Path, Path]
) -> None:
    repo = hub.state.repos[BASE]
    shard = "model-00002-of-00002.safetensors"
    content = bytearray(repo.commits[base_commit].files[shard].data)
    content[-1] ^= 1
    files = {**repo.commits[base_commit].files, shard: hub.state.blob(bytes(content))}
    object.__setattr__(repo.commits[base_commit], "files", files)
    error = other.bad("verify", TUNED)
    assert f"file '{shard}' of '{BASE}@{base_commit}' is not the file that is recorded" in error


def test_verify_without_a_record(other: Person, hub: LoopbackHub, pushed: str) -> None:
    repo = hub.state.repos[TUNED]
    repo.commit("main", {"delta.base.json": None}, "Forget")
    assert "their content was not checked" in other.good("verify", TUNED)


def test_verify_with_repositories_as_base_and_target(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    publish(hub, "org/tuned", checkpoints[1])
    shown = other.good("verify", TUNED, "--base", BASE, "--target", checkpoints[1])
    assert shown.splitlines()[1:] == [
        "base: correct, the delta rebuilds the target from it",
        "target: correct, every file",
    ]


def test_an_existing_path_is_preferred(
    other: Person, hub: LoopbackHub, pushed: str, checkpoints: tuple[Path, Path]
) -> None:
    place = other.folder / "org"
    place.mkdir()
    (place / "model").symlink_to(checkpoints[0])
    delta = save_delta(*checkpoints, other.folder / "d.sd")
    done = other.run("apply", "org/model", delta, "out")
    assert done.returncode == 0
    assert done.stderr == "wrote out\n"
    assert hub.requests == []
    done = other.run("apply", "hf://org/model", delta, "out2")
    assert done.returncode == 0
    assert hub.requests != []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["inspect", "me/nothing"],
            "there is no local path 'me/nothing', and there is no repository",
        ),
        (["inspect", "hf://me/nothing"], "error: there is no repository 'me/nothing'"),
        (["inspect", "folder/none.sd"], "'folder/none.sd': no such file or directory"),
        (["apply", "none/base.safetensors", "delta.sd", "out"], "no such file"),
        (["inspect", "hf://me"], "'hf://me' is not a model repository"),
        (["inspect", "me/tuned@gone"], "repository 'me/tuned' has no revision 'gone'"),
        (["inspect", "hf://me/tuned/none.sd"], "holds no delta"),
    ],
)
def test_arguments_that_name_nothing(
    other: Person, delta: Path, pushed: str, arguments: list[str], words: str
) -> None:
    (other.folder / "delta.sd").write_bytes(delta.read_bytes())
    assert words in other.bad(*arguments)


def test_mistyped_path_without_a_network(other: Person) -> None:
    error = other.bad("inspect", "modles/tuned", HF_ENDPOINT="http://127.0.0.1:9")
    assert "there is no local path 'modles/tuned', and the Hub cannot be reached" in error


def test_a_folder_in_a_repository_is_no_checkpoint(
    other: Person, me: Person, hub: LoopbackHub, delta: Path, checkpoints: tuple[Path, Path]
) -> None:
    """The checkpoint at the root is never taken in its place."""
    base, target = checkpoints
    files = {f"sub/{path}": content for path, content in files_of(target).items()}
    hub.state.add_repo("org/two", files_of(base) | files)
    shard = "model-00001-of-00002.safetensors"
    for path, said in (
        ("sub", "`hf download org/two --include 'sub/*' --local-dir DIR`"),
        (shard, f"`hf download org/two --include '{shard}' --local-dir DIR`"),
        ("nothing", "has neither a file nor a folder 'nothing'"),
    ):
        name = f"hf://org/two/{path}"
        for command in (
            ("diff", name, target, "-o", "d.sd"),
            ("diff", base, name, "-o", "d.sd"),
            ("apply", name, delta, "out"),
            ("verify", delta, "--base", name),
            ("verify", delta, "--base", base, "--target", name),
            ("push", delta, TUNED, "--base-id", name),
        ):
            who = me if command[0] == "push" else other
            error = who.bad(*command)
            assert said in error
    assert not (other.folder / "d.sd").exists()
    hub.state.add_commit("org/two", {"sub/delta.sd": delta.read_bytes()})
    assert "is a delta, not a checkpoint; pull it first" in other.bad(
        "diff", base, "hf://org/two/sub", "-o", "d.sd"
    )


def test_offline_with_a_part_of_a_checkpoint_in_the_cache(
    other: Person, hub: LoopbackHub, base_commit: str, checkpoints: tuple[Path, Path]
) -> None:
    other.good("diff", BASE, checkpoints[1], "-o", "d.sd")
    other.offline = True
    done = other.run("diff", BASE, checkpoints[1], "-o", "again.sd")
    assert done.returncode == 0
    assert "are those in the cache, which may lack some (offline)" in done.stderr
    for shard in (other.folder / "home" / "hub").glob(
        "models--org--model/snapshots/*/*.safetensors"
    ):
        shard.unlink()
    for command in (
        ("diff", BASE, checkpoints[1], "-o", "no.sd"),
        ("apply", BASE, "d.sd", "out"),
    ):
        error = other.bad(*command)
        assert "holds no" not in error
        assert "explain unreachable" in error
