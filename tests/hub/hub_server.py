"""A Hub on the loopback interface, with the part of the HTTP interface that the client uses for models.

It behaves like the Hub where a client depends on it. A large file is answered with a redirect to another
origin and with its SHA-256. A missing repository, revision or file has an error code in a header. A commit
with an outdated parent is refused. Quotas, webhooks, other kinds of repositories, multipart uploads and Xet
storage are not imitated. Faults are injected by rules.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # type: ignore[import-untyped]
from hub.hub_state import Blob, Commit, Repo, State, is_large

PAGE = 50  # entries of a listing


@dataclass
class Fault:
    """A rule that makes the first ``times`` matching requests fail.

    Attributes:
        method, path: the requests that match; the path is a regular expression for ``re.search``.
        status, headers: those of the answer that is sent instead.
        cut_after: fraction of the body after which the connection is dropped.
        seconds: delay before the answer.
        body: sent instead of the right body, with unchanged headers.
        action: called before the answer.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: float | None = None
    seconds: float = 0
    body: bytes | None = None
    action: Callable[[], object] | None = None


@dataclass(frozen=True)
class Xet:
    """Xet storage for large files.

    Attributes:
        store: address of the storage, ``local://`` and a folder, which the client reads and writes itself.
        hashes: Xet hashes of files, by SHA-256.
    """

    store: str
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """A received request, and the number of bytes of body sent in answer."""

    method: str
    path: str
    host: str
    headers: Mapping[str, str]
    n_sent: int


class Answer(Exception):
    """The response to a request."""

    def __init__(
        self,
        status: int,
        body: bytes | dict[str, Any] | list[Any] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status)
        self.status = status
        self.headers = dict(headers or {})
        if isinstance(body, bytes):
            self.body = body
        else:
            self.body = json.dumps(body).encode()
            self.headers.setdefault("Content-Type", "application/json")


class LoopbackHub:
    """A running server, with its state, its fault rules and the requests it has received."""

    def __init__(self) -> None:
        self.state = State()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.xet: Xet | None = None
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[LoopbackHub]:
        """Serve until the end of the block."""
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def fail(self, method: str, path: str, **what: Any) -> None:
        """Add a fault rule."""
        self.faults.append(Fault(method, path, **what))

    def sent(self, path: str) -> int:
        """Return the number of bytes sent in answer to requests whose path matches."""
        return sum(r.n_sent for r in self.requests if re.search(path, r.path))

    def count(self, method: str, path: str) -> int:
        """Return the number of matching requests."""
        return sum(r.method == method and bool(re.search(path, r.path)) for r in self.requests)

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Return the fault rule that a request matches, and count the use; None if there is none."""
        with self.state.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub
    cut_after: float | None = None
    replaced: bytes | None = None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Do not log."""

    def do_GET(self) -> None:
        """Answer any request."""
        content = self._content()
        fault = self.server_hub.take_fault(self.command, self.path)
        self.cut_after = fault.cut_after if fault else None
        self.replaced = fault.body if fault else None
        try:
            if fault:
                time.sleep(fault.seconds)
                if fault.action:
                    fault.action()
                if fault.status:
                    raise Answer(fault.status, b"", fault.headers)
            with self.server_hub.state.lock:
                self._route(content)
        except Answer as answer:
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: Answer) -> None:
        body = answer.body if self.replaced is None else self.replaced
        shown = b"" if self.command == "HEAD" else body
        n_sent = len(shown)
        if self.cut_after is not None:
            n_sent = int(len(shown) * self.cut_after)
        hub = self.server_hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        host = headers.get("host", "").partition(":")[0]
        hub.requests.append(Request(self.command, self.path, host, headers, n_sent))
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(shown[:n_sent])
        if n_sent < len(shown):
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _route(self, content: bytes) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        path = parts.path
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._large_file(found[1], content)
        self.user = self._user()
        if path == "/api/whoami-v2":
            self._need_user()
            raise Answer(200, {"type": "user", "name": self.user, "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            self._validate(json.loads(content)["content"])
        if path == "/api/repos/create":
            self._create(json.loads(content))
        for pattern, method in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                found_parts = [unquote(part or "") for part in found.groups()]
                getattr(self, _NAMES[pattern])(
                    self._repo(found_parts[0]), content, *found_parts[1:]
                )
        raise Answer(404, {"error": f"no route for {self.command} {path}"})

    # --- users, rights and repositories

    def _user(self) -> str | None:
        authorization = self.headers.get("Authorization", "")
        if not authorization:
            return None
        user = self.server_hub.state.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, {"X-Error-Message": message})
        return user

    def _need_user(self) -> None:
        if self.user is None:
            message = "Invalid username or password."
            raise Answer(401, {"error": message}, {"X-Error-Message": message})

    def _may_write(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user, "org")

    def _need_writer(self, namespace: str) -> None:
        self._need_user()
        if not self._may_write(namespace):
            message = f"You don't have the rights to write under the namespace {namespace}"
            raise Answer(403, {"error": message}, {"X-Error-Message": message})

    def _repo(self, repo_id: str) -> Repo:
        state = self.server_hub.state
        if repo_id in state.moved:
            url = self.path.replace(repo_id, state.moved[repo_id], 1)
            raise Answer(307, b"", {"Location": url})
        repo = state.repos.get(repo_id)
        if repo is None or (repo.private and not self._may_write(repo_id.split("/")[0])):
            status = 404 if self.user else 401
            raise Answer(
                status,
                {"error": "Repository not found"},
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            message = f"Invalid rev id: {revision}"
            raise Answer(
                404,
                {"error": message},
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": message},
            )
        return commit

    # --- reading

    def info(self, repo: Repo, _content: bytes, revision: str = "main") -> None:
        commit = self._commit(repo, revision or "main")
        detailed = "blobs" in self.query
        siblings = [_sibling(p, commit.files[p], detailed=detailed) for p in sorted(commit.files)]
        raise Answer(
            200,
            {
                "id": repo.id,
                "sha": commit.oid,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "siblings": siblings,
                "cardData": _head(commit),
                "tags": [],
                "downloads": 0,
            },
        )

    def tree(self, repo: Repo, _content: bytes, revision: str, folder: str = "") -> None:
        commit = self._commit(repo, revision)
        found = [p for p in sorted(commit.files) if not folder or p.startswith(folder + "/")]
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE < len(found):
            url = urlsplit(self.path).path
            following = f"{self.server_hub.url}{url}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        listed = [_entry(path, commit.files[path]) for path in found[start : start + PAGE]]
        raise Answer(200, listed, headers)

    def paths_info(self, repo: Repo, content: bytes, revision: str) -> None:
        commit = self._commit(repo, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(content)["paths"]
        else:
            paths = parse_qs(content.decode())["paths"]
        raise Answer(200, [_entry(p, commit.files[p]) for p in paths if p in commit.files])

    def refs(self, repo: Repo, _content: bytes) -> None:
        def listed(names: Mapping[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                for name, oid in names.items()
            ]

        raise Answer(
            200,
            {
                "branches": listed(repo.branches, "heads"),
                "tags": listed(repo.tags, "tags"),
                "converts": [],
            },
        )

    def resolve(self, repo: Repo, _content: bytes, revision: str, path: str) -> None:
        if repo.gated and (self.user is None or repo.id not in self.server_hub.state.accepted):
            message = f"Access to model {repo.id} is restricted."
            status = 403 if self.user else 401
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            raise Answer(status, {"error": message}, headers)
        commit = self._commit(repo, revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            raise Answer(404, b"Entry not found", headers)
        if not blob.lfs:
            headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
            self._ranged(blob.data, headers)
        headers |= {
            "Location": f"http://localhost:{self.server_hub.port}/cdn/{blob.sha256}?signed=1",
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(len(blob.data)),
            "ETag": f'"{blob.sha256}"',
        }
        xet = self.server_hub.xet
        if xet and (xet_hash := xet.hashes.get(blob.sha256)):
            route = f"{self.server_hub.url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route}
        raise Answer(302, b"", headers)

    def _large_file(self, sha256: str, content: bytes) -> None:
        state = self.server_hub.state
        if self.command == "PUT":
            blob = Blob(content, lfs=True)
            if blob.sha256 != sha256:
                raise Answer(400, b"content does not match its name")
            state.stored[sha256] = content
            raise Answer(200)
        if sha256 not in state.stored:
            raise Answer(404)
        self._ranged(state.stored[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            raise Answer(200, data, headers)
        begin, end = int(found[1]), int(found[2] or len(data) - 1)
        if begin >= len(data):
            raise Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        end = min(end, len(data) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
        raise Answer(206, data[begin : end + 1], headers)

    def xet_token(self, repo: Repo, _content: bytes, kind: str, _revision: str) -> None:
        if kind == "write":
            self._need_writer(repo.id.split("/")[0])
        xet = self.server_hub.xet
        if xet is None:
            raise Answer(404)
        token = {"casUrl": xet.store, "accessToken": "xet", "exp": int(time.time()) + 3600}
        headers = {
            "X-Xet-Cas-Url": xet.store,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(token["exp"]),
        }
        raise Answer(200, token, headers)

    # --- writing

    def _create(self, wanted: dict[str, Any]) -> None:
        self._need_user()
        namespace = wanted.get("organization") or self.user
        self._need_writer(str(namespace))
        repo_id = f"{namespace}/{wanted['name']}"
        state = self.server_hub.state
        url = f"{self.server_hub.url}/{repo_id}"
        if repo_id in state.repos:
            message = "You already created this model repo"
            raise Answer(409, {"error": message, "url": url}, {"X-Error-Message": message})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        state.add_repo(repo_id, {}, private=bool(private))
        raise Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def _validate(self, card: str) -> None:
        errors = []
        for found in re.finditer(r"^(?:base_model: |- )(/\S+)$", card, re.MULTILINE):
            errors.append({"message": f'"base_model" with value "{found[1]}" is not valid.'})
        if errors:
            raise Answer(400, {"errors": errors, "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: Repo, content: bytes, revision: str) -> None:
        self._need_writer(repo.id.split("/")[0])
        commit = self._commit(repo, revision)
        files = []
        for file in json.loads(content)["files"]:
            large = is_large(base64.b64decode(file["sample"]), file["size"])
            found = {"path": file["path"], "shouldIgnore": False}
            found["uploadMode"] = "lfs" if large else "regular"
            if file["path"] in commit.files:
                found["oid"] = commit.files[file["path"]].etag
            files.append(found)
        raise Answer(200, {"files": files})

    def lfs_batch(self, repo: Repo, content: bytes) -> None:
        self._need_writer(repo.id.split("/")[0])
        objects = []
        for wanted in json.loads(content)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.state.stored:
                href = f"http://localhost:{self.server_hub.port}/cdn/{wanted['oid']}"
                found["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(found)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def add_commit(self, repo: Repo, content: bytes, revision: str) -> None:
        self._need_writer(repo.id.split("/")[0])
        lines = [json.loads(line) for line in content.splitlines()]
        header = lines[0]["value"]
        changes: dict[str, Blob | None] = {}
        for line in lines[1:]:
            changes |= self._change(line["key"], line["value"])
        message, description = header["summary"], header.get("description", "")
        if "create_pr" in self.query:
            parent = header.get("parentCommit") or repo.branches["main"]
            number, commit = repo.open_pull_request(parent, changes, message, description)
            pull_request = f"{self.server_hub.url}/{repo.id}/discussions/{number}"
            self._committed(repo, commit, {"pullRequestUrl": pull_request})
        head = repo.names(revision).get(revision)
        if head is None:
            self._commit(repo, "no such branch " + revision)
        if header.get("parentCommit") not in (None, head):
            message = "A commit has happened since. Please refresh and try again."
            raise Answer(412, {"error": message}, {"X-Error-Message": message})
        self._committed(repo, repo.commit(revision, changes, message, description), {})

    def _committed(self, repo: Repo, commit: Commit, more: dict[str, str]) -> None:
        url = f"{self.server_hub.url}/{repo.id}/commit/{commit.oid}"
        raise Answer(200, {"success": True, "commitOid": commit.oid, "commitUrl": url, **more})

    def _change(self, key: str, value: dict[str, Any]) -> dict[str, Blob | None]:
        if key == "file":
            return {value["path"]: Blob(base64.b64decode(value["content"]), lfs=False)}
        if key == "lfsFile":
            stored = self.server_hub.state.stored.get(value["oid"])
            if stored is None or len(stored) != value["size"]:
                raise Answer(400, {"error": f"LFS pointer to {value['oid']}, which is not stored"})
            return {value["path"]: Blob(stored, lfs=True)}
        if key == "deletedFile":
            return {value["path"]: None}
        raise Answer(400, {"error": f"unknown change {key}"})

    def branch(self, repo: Repo, content: bytes, name: str) -> None:
        self._need_writer(repo.id.split("/")[0])
        if name in repo.branches:
            message = "Reference already exists"
            raise Answer(409, {"error": message}, {"X-Error-Message": message})
        start = json.loads(content or b"{}").get("startingPoint", "main")
        repo.branches[name] = self._commit(repo, start).oid
        raise Answer(200, {})

    def tag(self, repo: Repo, content: bytes, revision: str) -> None:
        self._need_writer(repo.id.split("/")[0])
        name = json.loads(content)["tag"]
        if name in repo.tags:
            message = "Tag reference exists already"
            raise Answer(409, {"error": message}, {"X-Error-Message": message})
        repo.tags[name] = self._commit(repo, revision).oid
        raise Answer(200, {})


def _head(commit: Commit) -> dict[str, Any] | None:
    """Return the metadata of a repository's card."""
    if "README.md" not in commit.files:
        return None
    parts = re.split(r"^---$", commit.files["README.md"].data.decode(), flags=re.MULTILINE)
    return dict(yaml.safe_load(parts[1])) if len(parts) > 2 else None


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(blob.data),
        "oid": blob.git_oid,
    }
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return entry


def _sibling(path: str, blob: Blob, *, detailed: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path}
    if detailed:
        entry |= {"size": len(blob.data), "blobId": blob.git_oid}
    if detailed and blob.lfs:
        entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return entry


_ID = r"([^/]+/[^/]+?)"
_NAMES = {
    rf"/api/models/{_ID}": "info",
    rf"/api/models/{_ID}/revision/([^/]+)": "info",
    rf"/api/models/{_ID}/tree/([^/]+)(?:/(.+))?": "tree",
    rf"/api/models/{_ID}/paths-info/([^/]+)": "paths_info",
    rf"/api/models/{_ID}/refs": "refs",
    rf"/api/models/{_ID}/xet-(read|write)-token/([^/]+)": "xet_token",
    rf"/{_ID}/resolve/([^/]+)/(.+)": "resolve",
    rf"/api/models/{_ID}/preupload/([^/]+)": "preupload",
    rf"/{_ID}\.git/info/lfs/objects/batch": "lfs_batch",
    rf"/api/models/{_ID}/commit/([^/]+)": "add_commit",
    rf"/api/models/{_ID}/branch/([^/]+)": "branch",
    rf"/api/models/{_ID}/tag/([^/]+)": "tag",
}
_READING = ("info", "tree", "refs", "resolve", "xet_token")
_ROUTES = [
    (pattern, ("GET", "HEAD") if name in _READING else ("POST",))
    for pattern, name in _NAMES.items()
]
