"""A hub on this machine: the part of the Hugging Face hub's HTTP API that reading a data set needs, over real HTTP.

What answers here is ours; what asks is the code of `huggingface_hub` and `datasets`, told by HF_ENDPOINT where to ask.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

_API = re.compile(
    r"/api/datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<at>[^/]+)(?P<below>.*))?"
)
_FILE = re.compile(r"/datasets/(?P<name>[^/]+/[^/]+)/resolve/(?P<at>[^/]+)/(?P<path>.+)")


class Hub:
    """Data sets by name, each a folder; its commit is a digest of what lies there now.

    Attributes:
        address: for HF_ENDPOINT.
        home: for HF_HOME, the caches of who asks.
        asked: method and path of each request so far.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.address = address
        self.home = folder / ".home"
        self.asked: list[tuple[str, str]] = []

    @property
    def environment(self) -> dict[str, str]:
        """For a process that reads from it."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}

    def files(self, name: str) -> dict[str, bytes] | None:
        """Content of a data set by path; None: there is no such data set."""
        folder = self.folder / name
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths} or None


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + body for name, body in files.items())).hexdigest()


@contextmanager
def started(folder: Path) -> Iterator[Hub]:
    """Serve the data sets OWNER/NAME of a folder."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            path, _, _ = self.path.partition("?")
            hub.asked.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = _FILE.fullmatch(path) or _API.fullmatch(path)
            if found is None:
                return self.say({} if path == "/" else None)
            files = hub.files(found["name"])
            if files is None or found["at"] not in (None, "main", commit_of(files)):
                return self.say(None, "RepoNotFound" if files is None else "RevisionNotFound")
            if found.re is _FILE:
                return self.send(found["path"], files)
            return self.say(described(found, files, body))

        def say(self, content: Any, problem: str = "EntryNotFound") -> None:
            if content is None:
                return self.reply(HTTPStatus.NOT_FOUND, b"{}", {"X-Error-Code": problem})
            return self.reply(HTTPStatus.OK, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def send(self, name: str, files: dict[str, bytes]) -> None:
            if name not in files:
                return self.say(None)
            body, status = files[name], HTTPStatus.OK
            headers = {"ETag": f'"{oid(body)}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[first : last + 1], HTTPStatus.PARTIAL_CONTENT
            return self.reply(status, body, headers)

        def reply(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(folder, f"http://127.0.0.1:{server.server_port}")
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def described(found: re.Match[str], files: dict[str, bytes], body: bytes) -> Any:
    """The answer of the API about a data set, a folder of it, or paths of it."""
    entries = [{"type": "file", "path": name, "size": len(file), "oid": oid(file)} for name, file in files.items()]
    if found["what"] in (None, "revision"):
        siblings = [{"rfilename": name} for name in files]
        return {"id": found["name"], "sha": commit_of(files), "private": False, "siblings": siblings, "tags": []}
    if found["what"] == "paths-info":
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
        return [entry for entry in entries if entry["path"] in wanted]
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    entries += [{"type": "directory", "path": name, "size": 0, "oid": oid(name.encode())} for name in sorted(folders)]
    below = Path(found["below"].strip("/"))
    return [entry for entry in entries if below in Path(str(entry["path"])).parents] or None
