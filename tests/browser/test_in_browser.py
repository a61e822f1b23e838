"""The page of ``inspect --html`` and the viewer in a real browser: three widths, light and dark, with axe.

``make browser-test`` installs the browser; without it these tests are skipped.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import noise, write_file

import sparsedelta
from sparsedelta.report.html import write_page

HERE = Path(__file__).parent
VIEWER = HERE.parents[1] / "docs" / "viewer"
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>.7.w"
N_LOOKS = 6


@pytest.fixture(scope="module")
def browser() -> Path:
    """Return the folder with the browser's packages, or skip the tests."""
    folder = Path(os.environ.get("SPARSEDELTA_BROWSER", HERE / "node_modules"))
    if not folder.is_dir() or shutil.which("node") is None:
        pytest.skip("needs a browser; run make browser-test")
    return folder


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a delta of 100 layers, whose names and info are those of an attacker."""
    folder = tmp_path_factory.mktemp("delta")
    tensors = {
        f"model.layers.{layer}.{kind}.weight": noise("F32", 20, 10, seed=layer)
        for layer in range(100)
        for kind in ("self_attn.q_proj", "mlp.down_proj", "norm")
    }
    tensors[EVIL], tensors["embed"] = noise("F32", 30), noise("F32", 90)
    changed = {
        name: tensor.changed(*range(0, 8 * (1 + number // 4 % 60), 4)) if number % 3 else tensor
        for number, (name, tensor) in enumerate(tensors.items())
    }
    changed[EVIL] = tensors[EVIL].changed(0)
    write_file(folder / "base.safetensors", tensors)
    write_file(folder / "target.safetensors", changed)
    info: dict[str, Any] = {
        EVIL: {"long": "x" * 500, "evil": EVIL},
        "losses": [[step, 3 / step] for step in range(1, 50)],
        "mean_change": {name: 1e-3 / (1 + number) for number, name in enumerate(tensors)},
        "evaluations": [
            {"step": 0, "values": {EVIL: 0.25}},
            {"step": 50, "values": {EVIL: 0.5}},
        ],
    }
    with sparsedelta.diff(
        folder / "base.safetensors", folder / "target.safetensors", base_id=EVIL, info=info
    ) as made:
        made.save(folder / "delta.sd")
    return folder / "delta.sd"


def look(
    browser: Path, folder: Path, step: dict[str, str], *, once: bool = False
) -> list[dict[str, Any]]:
    """Return what the browser finds at each width and in each scheme."""
    shutil.copy(HERE / "look.mjs", folder)
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(browser)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({**step, "once": once}))
    result = subprocess.run(
        ["node", folder / "look.mjs", plan],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    looks: list[dict[str, Any]] = json.loads(result.stdout)
    assert len(looks) == (1 if once else N_LOOKS)
    return looks


def check(looks: list[dict[str, Any]]) -> None:
    """Check that a page is accessible, fits its width, follows the scheme, and ran no foreign script."""
    for one in looks:
        where = f"{one['width']} pixels, {one['scheme']}"
        assert one["violations"] == [], where
        assert one["errors"] == [], where
        assert one["overflow"] <= 0, where
    light, dark = (
        {one["background"] for one in looks if one["scheme"] == scheme}
        for scheme in ("light", "dark")
    )
    assert light.isdisjoint(dark)


def test_page(browser: Path, delta: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(sparsedelta.inspect(delta), page, title=EVIL, overwrite=False)
    looks = look(browser, tmp_path, {"address": page.as_uri(), "picture": str(tmp_path / "page")})
    check(looks)
    assert EVIL in looks[0]["text"]
    assert len(list(tmp_path.glob("page-*.png"))) == N_LOOKS


def numbers(text: str) -> set[str]:
    return set(re.findall(r"[0-9][0-9,.]*(?: %| [kM]?B)?", text))


def test_viewer_opens_a_file_without_a_server(browser: Path, delta: Path, tmp_path: Path) -> None:
    address = (VIEWER / "index.html").as_uri()
    looks = look(browser, tmp_path, {"address": address, "file": str(delta)})
    check(looks)
    page = tmp_path / "page.html"
    write_page(sparsedelta.inspect(delta), page, title="delta.sd", overwrite=False)
    shown = look(browser, tmp_path, {"address": page.as_uri()}, once=True)
    assert looks[0]["cells"] == shown[0]["cells"] > 200
    assert EVIL in looks[0]["text"]
    assert numbers(shown[0]["text"]) <= numbers(looks[0]["text"])


def test_viewer_shows_why_a_file_is_refused(browser: Path, delta: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.sd"
    content = bytearray(delta.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    looks = look(
        browser, tmp_path, {"address": (VIEWER / "index.html").as_uri(), "file": str(damaged)}
    )
    check(looks)
    assert "Refused (corrupt): the digest of the manifest is wrong." in looks[0]["text"]


class Server(http.server.SimpleHTTPRequestHandler):
    """A web server with ranges, which counts the bytes of the delta that it sends."""

    sent = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.suffix != ".sd":
            super().do_GET()
            return
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found is not None
        begin, end = int(found[1]), min(int(found[2]) + 1, len(content))
        Server.sent += end - begin
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.write(content[begin:end])

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@pytest.fixture
def web(delta: Path, tmp_path: Path) -> Iterator[str]:
    """Serve the viewer, and the delta with a payload of a few megabytes; yield the address."""
    shutil.copytree(VIEWER, tmp_path / "www")
    tensor = noise("F32", 1_000_000)
    write_file(tmp_path / "base.safetensors", {"h.0.w": tensor})
    write_file(tmp_path / "target.safetensors", {"h.0.w": noise("F32", 1_000_000, seed=1)})
    with sparsedelta.diff(tmp_path / "base.safetensors", tmp_path / "target.safetensors") as made:
        made.save(tmp_path / "www" / "large.sd")
    handler = partial(Server, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_viewer_reads_only_the_beginning_over_http(browser: Path, web: str, tmp_path: Path) -> None:
    Server.sent = 0
    address = f"{web}/large.sd"
    looks = look(browser, tmp_path, {"address": f"{web}/index.html", "typed": address})
    check(looks)
    assert re.search(
        "9[0-9]{2},[0-9]{3} of 1,000,000 elements|1,000,000 of 1,000,000", looks[0]["text"]
    )
    n_bytes = (tmp_path / "www" / "large.sd").stat().st_size
    assert n_bytes > 2_000_000
    assert 0 < Server.sent <= 2 * N_LOOKS * 65536
