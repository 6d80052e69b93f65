"""A Hugging Face hub on 127.0.0.1: enough of its HTTP interface that the real ``huggingface_hub`` client works with it.

with FakeHub() as hub:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
    ...                      # client with HF_ENDPOINT=hub.endpoint
    assert hub.fetched() == {"config.json", "model.safetensors"}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".model")


@dataclass
class Repo:
    """One repository: commits, the names that point at them, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # the token that opens it; None: open to all
    gated: bool = False  # gated: anyone sees its pages, only the token's owner gets files. Otherwise private.


@dataclass(frozen=True)
class Request:
    """One request the hub received."""

    method: str
    path: str
    range: str | None
    token: str | None

    @property
    def file(self) -> str | None:
        """The file asked for, for a ``resolve`` address."""
        found = re.search(r"/resolve/[^/]+/(.+)", self.path)
        return unquote(found[1]) if found else None


class FakeHub:
    """The server; it runs in a thread while its context is open."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.cut: dict[str, int] = {}  # file → bytes after which its next GET breaks, once
        self.fail: dict[str, int] = {}  # file → status its GETs get, until removed
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def endpoint(self) -> str:
        """Its address, for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self, name: str, files: Mapping[str, bytes], *, ref: str = "main", token: str | None = None, gated: bool = False
    ) -> str:
        """Commit ``files`` to the repository and point ``ref`` at the commit, whose hash is returned."""
        repo = self.repos.setdefault(name, Repo())
        repo.token, repo.gated = token, gated
        commit = hashlib.sha1(repr((name, len(repo.commits), sorted(files.items()))).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def fetched(self) -> set[str]:
        """Files whose content was asked for."""
        return {r.file for r in self.log if r.method == "GET" and r.file is not None}

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go down: connections break, and new ones are refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(name: str, content: bytes) -> dict[str, Any] | None:
    if not name.endswith(LFS_SUFFIXES):
        return None
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            hub._connections.append(self.connection)

        def do_HEAD(self) -> None:
            self._serve()

        def do_GET(self) -> None:
            self._serve()

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            path = urlsplit(self.path).path
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.log.append(Request(self.command, path, self.headers.get("Range"), token))
            if m := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/tree/([^/]+)/?", path):
                self._api(m[1], unquote(m[2]), token, self._tree)
            elif m := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)/revision/([^/]+)", path):
                self._api(m[1], unquote(m[2]), token, self._info)
            elif m := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)", path):
                self._api(m[1], "main", token, self._info)
            elif m := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
                self._resolve(m[1], unquote(m[2]), unquote(m[3]), token)
            else:
                self._send(404, b"")

        def _commit(self, name: str, revision: str, token: str | None, *, content: bool) -> str | None:
            """The commit, once the caller is found to have the right; None when an error was sent."""
            repo = hub.repos.get(name)
            if token == "expired":
                self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif repo is None or (repo.token not in (None, token) and not repo.gated):
                headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                self._send(401 if token is None else 404, b"", headers)
            elif repo.gated and content and repo.token != token:
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
                self._send(401 if token is None else 403, b"", headers)
            elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            else:
                return commit
            return None

        def _api(self, name: str, revision: str, token: str | None, body: Any) -> None:
            if (commit := self._commit(name, revision, token, content=False)) is not None:
                answer = json.dumps(body(name, commit, hub.repos[name].commits[commit])).encode()
                self._send(200, answer, {"Content-Type": "application/json"})

        def _info(self, name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
            siblings = [
                {"rfilename": n, "size": len(c), "blobId": _blob_id(c), **({"lfs": lfs} if (lfs := _lfs(n, c)) else {})}
                for n, c in files.items()
            ]
            return {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}

        def _tree(self, name: str, commit: str, files: dict[str, bytes]) -> list[dict[str, Any]]:
            return [
                {
                    "type": "file",
                    "path": n,
                    "size": len(c),
                    "oid": _blob_id(c),
                    **({"lfs": {**lfs, "oid": lfs["sha256"]}} if (lfs := _lfs(n, c)) else {}),
                }
                for n, c in files.items()
            ]

        def _resolve(self, name: str, revision: str, file: str, token: str | None) -> None:
            if (commit := self._commit(name, revision, token, content=True)) is None:
                return
            content = hub.repos[name].commits[commit].get(file)
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if content is None:
                self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET" and file in hub.fail:
                self._send(hub.fail[file], b"")
                return
            headers["ETag"] = f'"{_blob_id(content)}"'
            if (lfs := _lfs(file, content)) is not None:
                headers |= {"X-Linked-Etag": f'"{lfs["sha256"]}"', "X-Linked-Size": str(lfs["size"])}
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if wanted and self.command == "GET":
                start = int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self._send(206, content[start:], headers)
            else:
                cut = hub.cut.pop(file, None) if self.command == "GET" else None
                self._send(200, content, headers, cut=cut)

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True

    return Handler
