"""The code of other projects, where it is installed: it reads our files, and we read its files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.skipif(
    find_spec("basilica") is None, reason="the packages of `make interop` are not installed"
)
def test_no_tensor_differs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "foreign_forms.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for number in (1, 2, 3):
        assert f"| pulsept1 {number} | yes | yes |" in done.stdout


def test_files_of_other_projects_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fetch_sources

    root = tmp_path / "root"
    sources: list[fetch_sources.Source] = []
    for number, source in enumerate(fetch_sources.SOURCES):
        path = root / source.repository / source.commit / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
        sources.append(source._replace(sha256=hashlib.sha256(b"%d" % number).hexdigest()))
    monkeypatch.setattr(fetch_sources, "SOURCES", sources)
    out = tmp_path / "sources"
    monkeypatch.setattr(sys, "argv", ["fetch_sources.py", str(out), "--root", root.as_uri()])
    assert fetch_sources.main() == 0
    assert (out / sources[0].place).read_bytes() == b"0"
    (out / sources[3].place).unlink()
    path = root / sources[3].repository / sources[3].commit / sources[3].path
    path.write_bytes(b"other")
    assert fetch_sources.main() == 1
    assert "has the SHA-256" in capsys.readouterr().err
    assert not (out / sources[3].place).exists()
