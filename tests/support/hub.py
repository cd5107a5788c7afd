"""A server on this machine that speaks the part of the Hub's API that klora uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """A repository: files by commit, and commits by revision."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    """What the server answers instead, such as GatedRepo."""
    is_private: bool = False

    def commit(self, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Add a commit and return its name."""
        text = json.dumps([[name, data.hex()] for name, data in sorted(files.items())])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = dict(files)
        self.revisions[revision] = self.revisions[name] = name
        return name


@dataclass
class Hub:
    """The server, its repositories, and every request so far."""

    address: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, repo: str, files: Mapping[str, bytes]) -> Repository:
        """Make a repository with one commit on main."""
        self.repositories[repo] = Repository()
        self.repositories[repo].commit(files)
        return self.repositories[repo]

    def answer(self, path: str, *, told: bool) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path; ``told`` says that the token came along."""
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        name = "/".join(parts[:2])
        repository = self.repositories.get(name)
        if repository is None or (repository.is_private and not told):
            return _refusal(401, "RepoNotFound")
        if repository.error is not None:
            return _refusal(403, repository.error)
        commit = repository.revisions.get(parts[3] if len(parts) > 3 else "main")
        if commit is None and is_api and len(parts) < 4:
            return _found({"id": name, "sha": None, "siblings": []})  # it is empty
        if commit is None:
            return _refusal(404, "RevisionNotFound")
        files = repository.commits[commit]
        if is_api and parts[2:3] == ["tree"]:
            return _found([_leaf(file, data) for file, data in files.items()])
        if is_api:
            siblings = [{"rfilename": file} for file in files]
            data = json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        else:
            file = "/".join(parts[4:])
            if file not in files:
                return _refusal(404, "EntryNotFound")
            data = files[file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit}, data

    def take(self, path: str, body: bytes, *, told: bool) -> tuple[int, dict[str, str], bytes]:
        """Return the same for a POST: a new repository, a check of a card, or an upload."""
        if not told:
            return _refusal(401, "Unauthorized")
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/validate-yaml":
            return _found({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            name = f"{lines[0]['organization']}/{lines[0]['name']}"
            self.repositories[name] = Repository(
                is_private=lines[0].get("visibility") == "private" or bool(lines[0].get("private"))
            )
            return _found({"url": f"{self.address}/{name}"})
        name, action = "/".join(path.split("/")[3:5]), path.split("/")[5]
        if action == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in lines[0]["files"]
            ]
            return _found({"files": files})
        assert action == "commit"
        repository = self.repositories[name]
        present = repository.commits.get(repository.revisions.get("main", ""), {})
        new = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = repository.commit({**present, **new})
        where = f"{self.address}/{name}/commit/{commit}"
        return _found({"commitUrl": where, "commitOid": commit})


def _leaf(file: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _found(facts: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()


def _refusal(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code}, b""


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(with_body=True, posted=body)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, *, with_body: bool, posted: bytes | None = None) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            told = self.headers.get("authorization") == f"Bearer {TOKEN}"
            path = unquote(self.path.partition("?")[0])
            if posted is None:
                status, headers, data = hub.answer(path, told=told)
            else:
                status, headers, data = hub.take(path, posted, told=told)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
