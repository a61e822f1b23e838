"""Behaviour of every command: help, start-up, errors, interruption, progress."""

from __future__ import annotations

import os
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from cli.cli_helpers import Process, Run, Workplace, command, environment
from helpers import assert_same_files, noise, write_sharded

import sparsedelta
from sparsedelta.cli import COMMANDS, main
from sparsedelta.codecs.kernels import in_use

ON_THE_HUB = {"push", "pull"}  # tests/hub runs their examples
HEAVY = ("numpy", "rich", "torch", "huggingface_hub", "zstandard", "blake3", "safetensors")


def help_of(name: str | None) -> str:
    context = click.Context(main, info_name="sparsedelta")
    if name is None:
        return main.get_help(context)
    found = main.get_command(context, name)
    assert found is not None
    return found.get_help(click.Context(found, info_name=name, parent=context))


def examples_in(text: str) -> list[list[str]]:
    """Return the examples at the end of a help page; fail if there is none."""
    match = re.search(r"\n\n +Examples?:\n((?: +sparsedelta .*\n?)+)\Z", text)
    assert match, "the help does not end with an example"
    return [shlex.split(line)[1:] for line in match[1].splitlines()]


@pytest.mark.parametrize("name", [None, *sorted({*COMMANDS} - ON_THE_HUB)])
def test_examples_of_the_help_do_what_they_say(
    workplace: Workplace, process: Process, name: str | None
) -> None:
    if name not in (None, "diff"):
        workplace.save_delta()
    if name == "verify":
        sparsedelta.apply(workplace.base, workplace.delta, workplace.out)
    if name == "stack":
        shutil.copy(workplace.delta, workplace.path / "monday.sd")
        with sparsedelta.invert(workplace.delta, base=workplace.base) as inverse:
            inverse.save(workplace.path / "tuesday.sd")
    if name in ("follow", "log", "prune"):
        assert process("publish", "channel", "target").returncode == 0
    if name == "merge":
        for number, other in enumerate(("sql.sd", "chat.sd")):
            save_in_place_change(workplace, workplace.path / other, 4 * number)
    for arguments in examples_in(help_of(name)):
        result = process(*arguments)
        assert (result.returncode, result.stderr.replace("wrote out\n", "")) == (0, "")
        assert bool(result.stdout) == (arguments[0] != "apply")
    assert sparsedelta.inspect(workplace.delta).nnz == 27
    if name in (None, "apply"):
        assert_same_files(workplace.target, workplace.out)


def save_in_place_change(workplace: Workplace, output: Path, position: int) -> None:
    """Write a delta of the base that changes one element."""
    raw = bytearray((workplace.base / "model.safetensors").read_bytes())
    raw[-position - 1] ^= 1
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(workplace.base, folder, dirs_exist_ok=True)
        Path(folder, "model.safetensors").write_bytes(raw)
        with sparsedelta.diff(workplace.base, folder) as delta:
            delta.save(output)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_printed_and_fits(run: Run, name: str | None) -> None:
    result = run(*([name] if name else []), "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    if name is None:
        commands = result.stdout.partition("Compare and rebuild:")[2].partition("Examples:")[0]
        assert re.findall(r"^  (\w+) ", commands, re.MULTILINE) == [*COMMANDS]
        assert "..." not in commands


@pytest.mark.parametrize("arguments", [["--help"], ["diff", "--help"], ["--version"], ["nonsense"]])
def test_start_up_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from sparsedelta.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    loaded = result.stderr.splitlines()[-1].split()
    assert "click" in loaded
    assert not {module.partition(".")[0] for module in loaded}.intersection(HEAVY)


def test_version(process: Process) -> None:
    assert process("--version").stdout == (
        f"sparsedelta {sparsedelta.__version__} ({in_use()} kernels)\n"
    )


@pytest.mark.parametrize("arguments", [["--version"], ["doctor"], ["inspect", "d.sd"]])
def test_unknown_kernels(workplace: Workplace, arguments: list[str]) -> None:
    result = subprocess.run(
        command(*arguments),
        env=environment(SPARSEDELTA_KERNELS="foo"),
        cwd=workplace.path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        "error: SPARSEDELTA_KERNELS is 'foo'; set it to compiled or numpy, or unset it\n",
    )


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["diff"], ["diff", "a", "b"], ["inspect", "--nonsense", "d"]]
)
def test_usage_errors(process: Process, arguments: list[str]) -> None:
    result = process(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: ")


def test_a_similar_command_is_proposed(run: Run) -> None:
    assert "no command is named 'exlain'; did you mean 'explain'?" in run("exlain").stderr
    assert "did you mean" not in run("nonsense").stderr


def test_option_with_an_unknown_value(workplace: Workplace, run: Run) -> None:
    result = run("diff", workplace.base, workplace.target, "-o", workplace.delta, "--values", "x")
    assert result.exit_code == 2
    assert "'ulp', 'target'" in result.stderr


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a\x1bb"), r"'a\x1bb': no such file or"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (FileExistsError("output 'x' exists"), "output 'x' exists"),
        (MemoryError(), "out of memory"),
        (MemoryError("unable to allocate 9 GiB"), "out of memory: unable to allocate 9 GiB"),
        (sparsedelta.SparseDeltaError("first\nsecond \x1b[31m"), r"first\nsecond \x1b[31m"),
        (ValueError("values is 'x'"), "values is 'x'"),
        (ValueError(), "ValueError"),
    ],
)
def test_failures_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, failure: Exception, line: str
) -> None:
    def fail(path: Path, *, base: Path | None) -> None:
        raise failure

    monkeypatch.setattr(sparsedelta, "inspect", fail)
    result = run("inspect", "delta.sd")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1
    debugged = run("--debug", "inspect", "delta.sd")
    assert (debugged.exit_code, debugged.stdout) == (1, "")
    assert debugged.stderr.startswith("Traceback")
    assert debugged.stderr.endswith(f"kernels: {in_use()}\n{result.stderr}")


def test_a_bug_shows_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *, base: Path | None) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(sparsedelta, "inspect", fail)
    with pytest.raises(KeyError, match="bug"):
        run("inspect", "delta.sd")


def test_missing_file(process: Process) -> None:
    for arguments in (["inspect", "none.sd"], ["diff", "none", "target", "-o", "x.sd"]):
        result = process(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(r"error: 'none(\.sd)?': no such file or directory\n", result.stderr)


@pytest.mark.parametrize(
    ("interrupt", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "ended by SIGTERM\n"),
    ],
)
def test_interrupt_is_one_line(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: KeyboardInterrupt,
    status: int,
    line: str,
) -> None:
    def end(path: Path, *, base: Path | None) -> None:
        raise interrupt

    monkeypatch.setattr(sparsedelta, "inspect", end)
    result = run("inspect", "delta.sd")
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", line)


class Terminal:
    """A process whose stderr is a terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._fd, stderr = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=folder,
            env=environment(TERM="xterm"),
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        os.close(stderr)
        self.seen = b""

    def read_until(self, text: bytes) -> None:
        """Read the output of the process until it contains this text."""
        while text not in self.seen:
            assert select.select([self._fd], [], [], 60)[0], "it shows nothing more"
            self.seen += os.read(self._fd, 1 << 16)

    def read_all(self) -> bytes:
        """Read until the process ends; return its stdout."""
        while True:
            try:
                block = os.read(self._fd, 1 << 16)
            except OSError:  # Linux reports in this way that the other side is closed
                break
            if not block:
                break
            self.seen += block
        os.close(self._fd)
        return self.process.communicate()[0]


def test_progress_is_shown_on_a_terminal_and_nowhere_else(workplace: Workplace) -> None:
    terminal = Terminal(workplace.path, "diff", "base", "target", "-o", "delta.sd")
    stdout = terminal.read_all()
    assert terminal.process.returncode == 0
    assert b"comparing" in terminal.seen
    assert terminal.seen.rstrip().endswith(b"\x1b[2K")  # removed from the screen at the end
    assert stdout.startswith(b"delta.sd: ")
    assert b"\x1b" not in stdout
    quiet = Terminal(workplace.path, "-q", "diff", "base", "target", "-o", "other.sd")
    assert quiet.read_all() == stdout.replace(b"delta.sd", b"other.sd")
    assert quiet.seen == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_work_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    for name in ("base", "target"):
        huge = 1 << 36
        header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (huge, huge)
        path = tmp_path / name
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + huge)  # a sparse file takes no space
    terminal = Terminal(tmp_path, "diff", "base", "target", "-o", "delta.sd")
    terminal.read_until(b"comparing")
    terminal.process.send_signal(number)
    assert terminal.read_all() == b""
    assert terminal.process.returncode == 128 + number
    told = b"interrupted" if number == signal.SIGINT else b"ended by " + number.name.encode()
    assert terminal.seen.rstrip().endswith(told)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "target"}


def test_more_shards_than_files_may_be_open_at_first(tmp_path: Path) -> None:
    shards = [{f"w{number}": noise("F32", 4, seed=number)} for number in range(60)]
    changed = [{name: tensor.changed(1)} for shard in shards for name, tensor in shard.items()]
    write_sharded(tmp_path / "base", shards)
    write_sharded(tmp_path / "target", changed)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    script = (
        "import sparsedelta\n"
        "with sparsedelta.diff('base', 'target') as delta: delta.save('api.sd')\n"
        "sparsedelta.apply('base', 'api.sd', 'api')"
    )
    for line in (
        command("diff", "base", "target", "-o", "delta.sd"),
        command("apply", "base", "delta.sd", "out"),
        [sys.executable, "-c", script],
    ):
        subprocess.run(
            line,
            cwd=tmp_path,
            env=environment(),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
            check=True,
            capture_output=True,
        )
    assert_same_files(tmp_path / "target", tmp_path / "out")
    assert_same_files(tmp_path / "target", tmp_path / "api")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_replaced(workplace: Workplace, closed: str) -> None:
    line = command("diff", str(workplace.base), str(workplace.target), "-o", str(workplace.delta))
    shell = f"{shlex.join(line)} {closed}"
    assert subprocess.run(["sh", "-c", shell], env=environment()).returncode == 0
    sparsedelta.verify(workplace.delta, base=workplace.base, target=workplace.target)


NO_ROOM = "error: 'standard output': no space left on device\n"


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full")
@pytest.mark.parametrize(
    ("redirected", "status", "said"), [(">/dev/full", 1, NO_ROOM), ("2>/dev/full", 0, "")]
)
def test_full_disk_behind_stdout_or_stderr(
    workplace: Workplace, redirected: str, status: int, said: str
) -> None:
    (workplace.target / "out.log").touch()  # reported on stderr as left out
    line = command("diff", str(workplace.base), str(workplace.target), "-o", str(workplace.delta))
    shell = ["sh", "-c", f"{shlex.join(line)} {redirected}"]
    done = subprocess.run(shell, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)
    sparsedelta.verify(workplace.delta, base=workplace.base, target=workplace.target)


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full")
def test_help_that_cannot_be_written(process: Process) -> None:
    shell = ["sh", "-c", f"{shlex.join(command('--help'))} >/dev/full"]
    done = subprocess.run(shell, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, NO_ROOM)


@pytest.mark.parametrize(("stream", "status"), [("stdout", 141), ("stderr", 0)])
def test_closed_pipe_on_a_standard_stream(workplace: Workplace, stream: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    workplace.save_delta()
    for arguments in (
        ["diff", "base", "target", "-o", "other.sd"],
        ["apply", "base", "delta.sd", "out"],
    ):
        done = subprocess.run(
            command(*arguments),
            cwd=workplace.path,
            env=environment(),
            stdout=writer if stream == "stdout" else subprocess.PIPE,
            stderr=writer if stream == "stderr" else subprocess.PIPE,
            check=False,
        )
        assert done.returncode == (status if arguments[0] == "diff" else 0)  # apply prints nothing
        assert (done.stderr or b"").replace(b"wrote out\n", b"") == b""
    os.close(writer)
    sparsedelta.verify(workplace.path / "other.sd", base=workplace.base, target=workplace.target)
    assert_same_files(workplace.target, workplace.out)


def test_full_disk_gives_one_line_and_leaves_nothing(workplace: Workplace) -> None:
    workplace.save_delta()
    before = {path.name for path in workplace.path.iterdir()}
    for arguments in (
        ["diff", "base", "target", "-o", "other.sd"],
        ["apply", "base", "delta.sd", "out"],
        ["stack", "delta.sd", "-o", "other.sd"],
    ):
        done = subprocess.run(
            command(*arguments),
            cwd=workplace.path,
            env=environment(PYTHONDONTWRITEBYTECODE="1"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        place = workplace.path / arguments[-1]
        assert done.stderr == f"error: '{place}': file too large\n"
        assert {path.name for path in workplace.path.iterdir()} == before


def test_commands_need_no_space_for_temporary_files(
    workplace: Workplace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_in_place_change(workplace, workplace.path / "sql.sd", 4)
    monkeypatch.chdir(workplace.path)
    monkeypatch.setattr("sparsedelta.format.spool._MEMORY_BYTES", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(workplace.path / "not there"))
    for line in (
        "diff base target -o delta.sd",
        "apply base delta.sd out",
        "invert delta.sd --base base -o inverse.sd",
        "stack delta.sd inverse.sd --base base -o both.sd",
        "merge base sql.sd -o merged.sd",
        "verify delta.sd --base base --target target",
    ):
        result = run(*line.split())
        assert result.exit_code == 0, result.stderr


def test_bar_counts_all_reports_and_shows_some(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedelta.cli import _progress

    shown: list[int] = []

    class Screen:
        task_ids = (0,)

        def add_task(self, label: str, total: int) -> None:
            pass

        def start(self) -> None:
            pass

        def stop(self) -> None:
            shown.append(-1)

        def update(self, task: int, completed: int) -> None:
            shown.append(completed)

    clock = iter([0.0, 0.01, 0.02, 0.2, 0.21, 0.4])
    monkeypatch.setattr(_progress, "_make_bar", Screen)
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = _progress.Bar()
    bar.start("comparing", 50)
    for _ in range(5):
        bar.advance(10)
    bar.finish()
    bar.finish()
    bar.advance(10)
    assert shown == [10, 40, -1]
