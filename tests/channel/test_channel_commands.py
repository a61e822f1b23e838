"""``publish``, ``follow``, ``log`` and ``prune`` on the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from channel.weights import is_at, save, weights
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import sparsedelta
from sparsedelta.channel import latest, publisher, replicas
from sparsedelta.channel.publisher import publish_checkpoint
from sparsedelta.cli import main
from sparsedelta.errors import BadVersion, Behind, Uncertain

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in a folder with the checkpoints 1, 2 and 3."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path / str(step), step)

    def call(*words: str, code: int = 0) -> Result:
        found = CliRunner().invoke(main, [*words])
        assert found.exit_code == code, (words, found.output, found.stderr)
        return found

    return call


def answer(found: Result) -> Any:
    return json.loads(found.stdout)


def test_publish_follow_log_and_prune(run: Run, tmp_path: Path) -> None:
    assert "version 1" in run("publish", "c", "1").stdout
    entry = answer(run("publish", "c", "2", "--base", "1", "--step", "20", "--json"))
    assert (entry["version"], entry["step"], entry["anchor"]) == (2, 20, None)
    report = answer(run("follow", "c", "out", "--once", "--json"))
    assert (report["version"], report["step"], report["before"]) == (2, 20, None)
    assert is_at(tmp_path / "out", 2)
    assert "there already" in run("follow", "c", "out", "--once").stdout
    run("publish", "c", "3", "--base", "2", "--anchor-every", "1")
    assert "version 3" in run("follow", "c", "out", "--once").stdout
    assert is_at(tmp_path / "out", 3)
    versions = answer(run("log", "c", "--json"))["versions"]
    assert [one["version"] for one in versions] == [3, 2, 1]
    assert len(run("log", "c", "-n", "2").stdout.splitlines()) == 2
    assert answer(run("prune", "c", "--keep", "1", "--json"))["leased"] == 1  # follow took a lease
    assert "deleted 0 objects" in run("prune", "c", "--keep", "3").stdout


def test_log_marks_versions_that_were_pruned(run: Run) -> None:
    run("publish", "c", "1")
    run("publish", "c", "2", "--base", "1")
    run("publish", "c", "3")
    assert "version 3 is the oldest left" in run("prune", "c", "--keep", "1").stdout
    assert [one.endswith("  pruned") for one in run("log", "c").stdout.splitlines()] == [
        False,
        True,
        True,
    ]
    versions = answer(run("log", "c", "--json"))["versions"]
    assert [one["pruned"] for one in versions] == [False, True, True]


def test_log_shows_the_info_of_a_version(run: Run, tmp_path: Path) -> None:
    info: dict[str, Any] = {
        "loss": 0.123456789,
        "n": 3,
        "note": "a\x1b[31m" + 60 * "b",
        "all": {"x": 1},
    }
    publish_checkpoint(sparsedelta.Channel(tmp_path / "c"), tmp_path / "1", step=4, info=info)
    line = run("log", "c").stdout
    assert f"  step 4  loss 0.123457  n 3  note a\\x1b[31m{34 * 'b'}  run " in line


def test_publish_leaves_files_out(run: Run, tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / str(step) / "pytorch_model.bin").write_bytes(b"of step %d" % step)
    refused = run("publish", "c", "1", code=1).stderr
    assert "leave it out (exclude=): --exclude pytorch_model.bin" in refused
    run("publish", "c", "1", "--exclude", "pytorch_model.bin")
    run("publish", "c", "2", "--base", "1", "--exclude", "pytorch_model.bin")
    run("follow", "c", "out", "--once")
    assert is_at(tmp_path / "out", 2)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_publish_of_the_same_is_a_note(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    assert "nothing was published" in run("publish", "c", "1").stderr
    assert len(answer(run("log", "c", "--json"))["versions"]) == 1
    assert "nothing was published" in run("publish", "c", "1", "--base", "1").stderr
    same = run("publish", "c", "1", "--base", "1", "--step", "5")
    assert "nothing was published" in run("publish", "c", "1", "--base", "2", "--step", "5").stderr
    assert "version 2 has the same weights as version 1" in same.stderr
    assert "same" not in run("publish", "c", "2", "--base", "1").stderr
    shutil.copytree("2", "of the same weights")
    (tmp_path / "of the same weights" / "config.json").write_text("{}")
    run("publish", "c", "of the same weights", "--base", "2")
    assert len(answer(run("log", "c", "--json"))["versions"]) == 4


def test_publish_of_the_other_kind_is_refused_and_of_another_dtype_reported(
    run: Run, tmp_path: Path
) -> None:
    run("publish", "c", "1/model.safetensors", "--step", "2")
    refused = run("publish", "c", "2", code=1).stderr
    assert "are single files, and '2' is a folder; give its weight file" in refused
    held = {name: tensor.double() for name, tensor in weights(2).items()}
    save_file(held, tmp_path / "2" / "model.safetensors")
    words = run("publish", "c", "2/model.safetensors", "--step", "1", "--quiet").stderr.splitlines()
    assert words[0].startswith("warning: 2 of 2 tensors have another dtype than in version 1")
    assert words[1].startswith("warning: version 2 has step 1 and the version before it has step 2")
    assert len(words) == 2


def test_a_first_publish_that_fails_leaves_no_channel(run: Run, tmp_path: Path) -> None:
    (tmp_path / "1" / "other.bin").write_bytes(b"weights")
    assert "other.bin" in run("publish", "c", "1", code=1).stderr
    assert not [*(tmp_path / "c").iterdir()]
    run("publish", "c", "2")


def test_the_name_of_out_fits_what_was_published(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1/model.safetensors")
    error = run("follow", "c", "out/", "--once", code=1).stderr
    assert "output 'out/' is written like a folder, but the output is one file" in error
    assert "'out' is a safetensors file, not a folder" in run("follow", "c", "out", "--once").stderr
    assert not run("follow", "c", "out", "--once").stderr
    run("publish", "d", "1")
    error = run("follow", "d", "o.safetensors", "--once", code=1).stderr
    assert "is named like a weight file, but the output is a folder" in error


def test_publish_of_an_adapter_and_what_is_a_delta_are_told(run: Run, tmp_path: Path) -> None:
    run("diff", "1", "2", "-o", "d.sd")
    for words in (("log",), ("follow", "out"), ("prune", "--keep", "1"), ("publish", "1")):
        error = run(words[0], "d.sd", *words[1:], code=1).stderr
        assert "is a delta, expected a channel" in error
        assert "`sparsedelta inspect d.sd`" in error
    (tmp_path / "1" / "adapter_config.json").write_text("{}")
    assert "warning: '1' is a PEFT adapter" in run("publish", "c", "1").stderr


def test_follow_goes_to_a_version_and_runs_a_command(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    run("publish", "c", "2", "--base", "1")
    command = 'echo "$SPARSEDELTA_VERSION $SPARSEDELTA_OUT" > seen'
    run("follow", "c", "out", "--version", "1", "--run", command)
    assert (tmp_path / "seen").read_text() == f"1 {tmp_path / 'out'}\n"
    assert is_at(tmp_path / "out", 1)
    assert "exit code 3" in run("follow", "c", "out", "--once", "--run", "exit 3", code=1).stderr


def test_follow_runs_its_command_once_for_each_version(run: Run, tmp_path: Path) -> None:
    """As a job that starts it every few minutes needs it; after a failure the command runs again."""
    run("publish", "c", "1")
    once = ("follow", "c", "out", "--once", "--run")
    count = "echo $SPARSEDELTA_VERSION >> seen"
    run("follow", "c", "out", "--once")
    for _ in range(2):  # it was there already, but the command has not run yet
        run(*once, count)
    run("publish", "c", "2", "--base", "1")
    run(*once, f"{count}; exit 1", code=1)
    for _ in range(2):
        run(*once, count)
    run("follow", "c", "out", "--version", "1", "--run", count)
    assert (tmp_path / "seen").read_text().split() == ["1", "2", "2", "1"]
    # Another channel's version of this number, that OUT has become without the command.
    run("publish", "other", "3")
    run("follow", "other", "out", "--once", "--overwrite")
    run("follow", "other", "out", "--once", "--run", count)
    assert (tmp_path / "seen").read_text().split() == ["1", "2", "2", "1", "1"]


def test_the_output_of_the_command_is_not_in_the_json(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    command = [sys.executable, "-m", "sparsedelta", "follow", "c", "out", "--once", "--json"]
    done = subprocess.run(
        [*command, "--run", "echo told"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["version"] == 1
    assert done.stderr == "told\n"


def test_an_address_of_a_web_server_without_a_channel(run: Run, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    make = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/typo"
        error = run("follow", url, "out", "--once", code=1).stderr
        assert "it has no version yet, or does not exist (sparsedelta explain behind)" in error
        assert "the channel has no version" in run("log", url).stderr
        with pytest.raises(Behind):
            sparsedelta.Follower(url, tmp_path / "out").sync()
        server.shutdown()


def test_follow_does_not_replace_what_took_the_place_of_its_folder(
    run: Run, tmp_path: Path
) -> None:
    run("publish", "c", "1")
    run("follow", "c", "out", "--once")
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "2", tmp_path / "out")
    run("publish", "c", "3")
    assert "exists" in run("follow", "c", "out", "--once", code=1).stderr
    assert is_at(tmp_path / "out", 2)
    run("follow", "c", "out", "--once", "--overwrite")
    assert is_at(tmp_path / "out", 3)


def test_follow_does_not_replace_a_copy_of_a_version_that_it_has_not_written(
    run: Run, tmp_path: Path
) -> None:
    run("publish", "c", "1")
    shutil.copytree(tmp_path / "1", tmp_path / "own")
    (tmp_path / "own" / "notes.txt").write_text("mine")
    run("publish", "c", "2", "--base", "1")
    assert "exists" in run("follow", "c", "own", "--once", code=1).stderr
    assert (tmp_path / "own" / "notes.txt").exists()
    run("follow", "c", "own", "--once", "--overwrite")
    assert is_at(tmp_path / "own", 2)


def test_a_folder_that_was_deleted_meanwhile_is_written_again(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    follower = sparsedelta.Follower(tmp_path / "c", tmp_path / "out")
    follower.sync()
    shutil.rmtree(tmp_path / "out")
    assert follower.sync().n_bytes > 0
    assert is_at(tmp_path / "out", 1)
    follower.close()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["missing", "other bytes", "other header"])
def test_follow_mends_its_folder(
    name: str, what: str, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is missing or has other bytes, although nothing new was published."""
    for number in (1, 2):
        (tmp_path / str(number) / "config.json").write_text(json.dumps({"step": number}))
    run("publish", "c", "1")
    run("publish", "c", "2", "--base", "1")
    run("follow", "c", "out", "--once")
    before = (tmp_path / "out" / name).read_bytes()
    (tmp_path / "out" / name).unlink()
    if what == "other bytes":
        (tmp_path / "out" / name).write_bytes(before[:-1] + b"x")
    elif what == "other header":
        (tmp_path / "out" / name).write_bytes(before.replace(b'{"', b'{ "', 1))
        if name == "model.safetensors":
            save_file(load_file(tmp_path / "2" / name), tmp_path / "out" / name, {"by": "hand"})
    assert "read" in run("follow", "c", "out", "--once").stdout
    in_tensors = what == "other bytes" and name == "model.safetensors"
    assert (
        f"{'a weight file' if in_tensors else repr(name)} in '{tmp_path / 'out'}' is missing or changed"
        in caplog.text
    )
    assert (tmp_path / "out" / name).read_bytes() == before
    assert "there already" in run("follow", "c", "out", "--once").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("follow", "c", "out", "--once"), "no version"),
        (("follow", "1", "out"), "not a channel"),
        (("apply", "1", "d.sd", "o.safetensors"), "is named like a weight file"),
        (("publish", "1", "2"), "not a channel"),
        (("log", "1"), "not a channel"),
        (("log", "1/model.safetensors"), "is a file, expected a channel"),
        (("publish", "1/model.safetensors", "2"), "is a file, expected a channel"),
        (("prune", "1", "--keep", "1"), "not a channel"),
        (("publish", "c", "2", "--base", "1"), "which has none yet"),
        (("prune", "c",), "--keep"),
        (("prune", "c", "--keep", "1.5"), "'1.5' is not a valid integer."),
        (("publish", "https://127.0.0.1:1/c", "1"), "127.0.0.1"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(run: Run, words: tuple[str, ...], says: str) -> None:
    run("diff", "1", "2", "-o", "d.sd")
    found = run(*words, code=2 if "prune" in words and "c" in words else 1)
    assert says in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", ["publish", "follow", "log", "prune"])
def test_help_has_an_example(run: Run, name: str) -> None:
    assert re.search(rf"sparsedelta {name} channel/", run(name, "--help").stdout)


def with_config(folder: Path, source: Path, config: dict[str, int]) -> Path:
    """Copy a checkpoint, with another configuration."""
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def configured(run: Run, tmp_path: Path) -> Path:
    """The checkpoints 1, 2 and 3 with one configuration, and 1b: the weights of 1 with another one."""
    for step in (1, 2, 3):
        (tmp_path / str(step) / "config.json").write_text('{"k": 1}')
    return with_config(tmp_path / "1b", tmp_path / "1", {"k": 2})


def same_folders(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


@pytest.mark.usefixtures("configured")
def test_a_change_of_side_files_alone_is_published(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    assert "nothing was published" in run("publish", "c", "1").stderr
    assert "version 2" in run("publish", "c", "1b").stdout
    assert "nothing was published" in run("publish", "c", "1b").stderr
    assert "version 3" in run("publish", "c", "1b", "--step", "3").stdout
    assert "nothing was published" in run("publish", "c", "1b", "--step", "3").stderr
    run("follow", "c", "out", "--once")
    assert same_folders(tmp_path / "out", tmp_path / "1b")


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("target", ["1", "2"])
def test_a_base_with_the_weights_of_the_latest_version_and_other_files(
    run: Run, tmp_path: Path, target: str
) -> None:
    """Followers have the files of the latest version, so the delta carries what these lack."""
    run("publish", "c", "1")
    run("publish", "c", "1b", "--base", "1")
    run("follow", "c", "at-2", "--once")
    assert "version 3" in run("publish", "c", target, "--base", "1").stdout
    for out in ("at-2", "new"):
        run("follow", "c", out, "--once")
        assert same_folders(tmp_path / out, tmp_path / target)


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("way", ["older copy", "another channel"])
def test_a_version_with_the_same_weights_and_other_files_is_not_there_already(
    run: Run, tmp_path: Path, way: str
) -> None:
    run("publish", "c", "1")
    shutil.copytree(tmp_path / "c", tmp_path / "old")
    run("publish", "c", "1b", "--base", "1")
    run("follow", "c", "out", "--once")
    more = ("--version", "1") if way == "older copy" else ("--once", "--overwrite")
    if way == "another channel":
        run("publish", "other", "1")
    channel = "old" if way == "older copy" else "other"
    assert "there already" not in run("follow", channel, "out", *more).stdout
    assert same_folders(tmp_path / "out", tmp_path / "1")
    # That it went back is known from now on.
    assert "there already" in run("follow", channel, "out", "--once").stdout


@pytest.mark.usefixtures("configured")
def test_a_folder_that_no_follower_has_written_is_not_taken_for_a_version(
    run: Run, tmp_path: Path
) -> None:
    run("publish", "c", "1")
    for out in ("1b", "own"):
        if out == "own":
            run("follow", "c", out, "--once")
            (tmp_path / ".own.sparsedelta-held.json").unlink()
            (tmp_path / "own" / "config.json").write_text("{}")
        assert "exists" in run("follow", "c", out, "--once", code=1).stderr
        run("follow", "c", out, "--once", "--overwrite")
        assert same_folders(tmp_path / out, tmp_path / "1")


def test_another_follower_of_a_new_place_is_quicker(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("publish", "c", "1")
    loaded = replicas.loaded_deltas

    def outrun(*given: Any) -> Any:
        monkeypatch.setattr(replicas, "loaded_deltas", loaded)
        assert sparsedelta.Follower(tmp_path / "c", tmp_path / "out").sync().n_versions == 1
        return loaded(*given)

    monkeypatch.setattr(replicas, "loaded_deltas", outrun)
    assert "there already" in run("follow", "c", "out", "--once").stdout
    assert is_at(tmp_path / "out", 1)


def test_a_copy_of_a_follower_s_folder_goes_on(run: Run, tmp_path: Path) -> None:
    """As in an image of a container: the files have other inodes and times."""
    run("publish", "c", "1")
    (tmp_path / "here").mkdir()
    run("follow", "c", "here/out", "--once")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    run("publish", "c", "2", "--base", "1")
    found = answer(run("follow", "c", "there/out", "--once", "--json"))
    assert (found["before"], found["version"], found["anchor"]) == (1, 2, False)
    assert is_at(tmp_path / "there" / "out", 2)


@pytest.mark.parametrize("removed", ["deltas", "anchors"])
def test_a_copy_of_a_channel_that_lacks_an_object_is_not_called_pruned(
    run: Run, tmp_path: Path, removed: str
) -> None:
    run("publish", "c", "1")
    run("publish", "c", "2", "--base", "1")
    run("follow", "c", "out", "--version", "1")
    shutil.rmtree(tmp_path / "c" / removed)
    out = "out" if removed == "deltas" else "new"
    error = run("follow", "c", out, "--once", code=1).stderr
    assert "lacks objects of version 2 or of one before it, and that was not pruned" in error


@pytest.mark.usefixtures("configured")
def test_another_publisher_adds_a_version_while_one_reads_the_latest(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the delta leaves out, the version had that was read, not the one that was added."""
    run("publish", "c", "1")
    read = latest.read_latest

    def outrun(*given: Any) -> Any:
        monkeypatch.setattr(publisher, "read_latest", read)
        found = read(*given)
        run("publish", "c", "1b", "--base", "1")
        return found

    monkeypatch.setattr(publisher, "read_latest", outrun)
    assert "added by another publisher" in run("publish", "c", "2", "--base", "1", code=1).stderr
    run("follow", "c", "out", "--once")
    assert same_folders(tmp_path / "out", tmp_path / "1b")


@pytest.mark.parametrize("out", ["run", "run/c", "run/c/out", "run/link"])
def test_out_is_never_the_channel_or_around_or_in_it(run: Run, tmp_path: Path, out: str) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / "run" / "model")
    (tmp_path / "run" / "link").symlink_to("c")
    run("publish", "run/c", "1")
    shutil.copytree(tmp_path / "1", tmp_path / "run" / "c" / "weights")
    error = run("follow", "run/c", out, "--once", "--overwrite", code=1).stderr
    assert f"output '{out}' and channel '{tmp_path / 'run' / 'c'}': one contains the other" in error
    assert "one contains the other" in run("publish", "run/c", "run", code=1).stderr
    assert "version 1" in run("log", "run/c").stdout
    assert (tmp_path / "run" / "model").is_dir()


def test_out_is_never_the_base_of_the_anchors(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "2", "--anchor-base", "1")
    again = run("follow", "c", "1", "--once", "--base", "1", "--overwrite", code=1)
    assert "output '1' is also an input" in again.stderr
    assert is_at(tmp_path / "1", 1)
    wrong = run("follow", "c", "out", "--once", "--base", "3", code=1)
    assert "the base of the channel's anchor is a checkpoint outside the channel: " in wrong.stderr


def test_one_s_own_file_in_the_place_of_a_followed_one(run: Run, tmp_path: Path) -> None:
    """The channel is whole, and the file is not the follower's."""
    run("publish", "c", "1/model.safetensors")
    run("follow", "c", "out.safetensors", "--once")
    (tmp_path / "out.safetensors").unlink()
    shutil.copy(tmp_path / "3" / "model.safetensors", tmp_path / "out.safetensors")
    error = run("follow", "c", "out.safetensors", "--once", code=1).stderr
    assert "output 'out.safetensors' exists" in error.replace(f"{tmp_path}/", "")
    assert "--overwrite" in error


def test_a_channel_that_began_anew_and_has_come_further(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    held = weights(0)
    follower = sparsedelta.Follower(tmp_path / "c", held)
    follower.sync()
    shutil.rmtree(tmp_path / "c")
    run("publish", "c", "2")
    run("publish", "c", "3", "--base", "2")
    with pytest.raises(BadVersion, match=r"it began anew in this place; .* a new follower takes"):
        follower.sync()
    assert is_at(held, 1)
    sparsedelta.Follower(tmp_path / "c", held).sync()
    assert is_at(held, 3)


def test_what_says_that_a_command_has_run_is_damaged(run: Run, tmp_path: Path) -> None:
    run("publish", "c", "1")
    run("follow", "c", "out", "--once", "--run", "true")
    (tmp_path / ".out.sparsedelta-ran").write_bytes(b"\xff\xff")
    run("follow", "c", "out", "--once", "--run", "touch again")
    assert (tmp_path / "again").exists()


def test_a_weight_file_that_is_damaged_while_a_follower_runs(run: Run, tmp_path: Path) -> None:
    """The next version finds it, and the call after that rebuilds the folder."""
    run("publish", "c", "1")
    with sparsedelta.Follower(tmp_path / "c", tmp_path / "out") as follower:
        follower.sync()
        weights = tmp_path / "out" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-2])
        run("publish", "c", "2", "--base", "1")
        with pytest.raises(Uncertain, match="sync again to rebuild it"):
            follower.sync()
        assert follower.version is None
        assert follower.sync().anchor
    assert is_at(tmp_path / "out", 2)
