"""Builds wheel and sdist, checks that a second build gives the same bytes, and installs both in clean environments.

    python tests/check_dist.py [--out dist] [--python PATH ...]

Each build starts from a copy of the files under version control, in a folder of its own. Times in the archives are
SOURCE_DATE_EPOCH, or the time of the last commit.
"""

from __future__ import annotations

import argparse
import filecmp
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def run(*command: str | Path, **variables: str) -> str:
    """Run a program, and return its stdout; exit with its output if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path, epoch: str) -> Path:
    """Return the folder with wheel and sdist, built from a copy of the tracked files in ``folder``."""
    for name in run("git", "-C", ROOT, "ls-files", "-z").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    out = folder / "dist"
    run(sys.executable, "-m", "build", "--outdir", out, folder, SOURCE_DATE_EPOCH=epoch)
    (sdist,) = out.glob("*.tar.gz")
    repack(sdist, int(epoch))
    return out


def repack(sdist: Path, epoch: int) -> None:
    """Write the archive again, sorted, with one time and no owner: setuptools keeps those of the build."""
    with tarfile.open(sdist) as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        contents = {
            m.name: (archive.extractfile(m) or open(os.devnull, "rb")).read()  # noqa: SIM115
            for m in members
            if m.isfile()
        }
    with (
        sdist.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=raw) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        import io

        for member in members:
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            archive.addfile(member, io.BytesIO(contents.get(member.name, b"")))


def check_equal(first: Path, second: Path) -> None:
    """Exit if two builds differ."""
    names = sorted(path.name for path in first.iterdir())
    equal, differing, missing = filecmp.cmpfiles(first, second, names, shallow=False)
    if differing or missing:
        sys.exit(f"two builds differ in {', '.join(differing + missing)}")
    print(f"built twice, equal byte for byte: {', '.join(equal)}")


def pythons(chosen: list[str]) -> list[str]:
    """Return the interpreters to install with: those given, or those of each version that are found."""
    found = chosen or [f"python{version}" for version in VERSIONS]
    return [name for name in found if works(name)]


def works(python: str) -> bool:
    """Return whether an interpreter runs and is new enough."""
    program = shutil.which(python)
    check = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
    return (
        program is not None
        and not subprocess.run([program, "-c", check], check=False, capture_output=True).returncode
    )


def try_out(python: str, archive: Path, kernels: str, **variables: str) -> None:
    """Install an archive in a clean environment, and rebuild a checkpoint with it, away from the checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(python, "-m", "venv", folder / "venv")
        programs = folder / "venv" / "bin"
        run(programs / "python", "-m", "pip", "install", "--quiet", archive, **variables)
        command = programs / "sparsedelta"
        version = run(command, "--version", PYTHONPATH="").strip()
        if kernels not in version:
            sys.exit(f"{archive.name} with {python}: {version!r} does not say {kernels}")
        script = ROOT / "examples" / "two_checkpoints.py"
        run(programs / "python", script, "--folder", folder)
        base, tuned, delta, out = (folder / n for n in ("base", "tuned", "delta.sd", "out"))
        run(command, "diff", base, tuned, "-o", delta)
        run(command, "apply", base, delta, out)
        if filecmp.dircmp(tuned, out).diff_files:
            sys.exit(f"{archive.name} with {python}: the rebuilt checkpoint differs")
        typed = "import sparsedelta, pathlib as p; print((p.Path(sparsedelta.__file__).parent / 'py.typed').exists())"
        if run(programs / "python", "-P", "-c", typed).strip() != "True":
            sys.exit(f"{archive.name} with {python}: py.typed is missing")
    print(f"{archive.name} with {python}: {version}")


def main() -> None:
    """Build, compare, install."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", action="append", default=[], help="interpreter to install with")
    options = parser.parse_args()
    epoch = (
        os.environ.get("SOURCE_DATE_EPOCH")
        or run("git", "-C", ROOT, "log", "-1", "--format=%ct").strip()
    )
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        built = build(Path(first), epoch)
        check_equal(built, build(Path(second), epoch))
        shutil.rmtree(options.out, ignore_errors=True)
        shutil.copytree(built, options.out)
    (wheel,) = options.out.glob("*.whl")
    (sdist,) = options.out.glob("*.tar.gz")
    found = pythons(options.python)
    if not found:
        sys.exit("no Python 3.11 or newer was found to install with; name one with --python")
    for python in found:
        try_out(python, wheel, "compiled")
    try_out(found[0], sdist, "numpy", CC="/bin/false")


if __name__ == "__main__":
    main()
