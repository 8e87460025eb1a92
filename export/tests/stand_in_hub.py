"""A stand-in for the Hugging Face hub on loopback: serves folders as models, with what `huggingface_hub` asks of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/(.+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Model:
    """`revisions`: branch or tag → folder. `locked`: status and error code of every file, for gated models."""

    revisions: dict[str, Path]
    locked: tuple[int, str] | None = None

    def commit(self, revision: str) -> str:
        return hashlib.sha1(str(self.revisions[revision]).encode()).hexdigest()

    def folder(self, revision: str) -> Path | None:
        if revision in self.revisions:
            return self.revisions[revision]
        return next((folder for name, folder in self.revisions.items() if self.commit(name) == revision), None)


@dataclass
class Hub:
    url: str
    models: dict[str, Model] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file → after how many bytes the next answers break off
    log: list[str] = field(default_factory=list)  # method, path and range of every request

    def fetched(self) -> set[str]:
        """Files whose bytes were asked for since the log was last cleared."""
        wanted = [_FILE.fullmatch(line.split()[1]) for line in self.log if line.startswith("GET")]
        return {found[3] for found in wanted if found}


@contextmanager
def serve() -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if found := _FILE.fullmatch(path):
            self.send_file(*found.groups())
        elif found := _TREE.fullmatch(path):
            self.send_tree(*found.groups())
        elif found := _INFO.fullmatch(path):
            self.send_info(found[1], found[2] or "main")
        else:
            self.refuse(404, "")

    def folder(self, name: str, revision: str) -> Path | None:
        model = self.hub.models.get(name)
        folder = model.folder(revision) if model else None
        if model is None:
            self.refuse(401, "RepoNotFound")
        elif folder is None:
            self.refuse(404, "RevisionNotFound")
        return folder

    def send_info(self, name: str, revision: str) -> None:
        if folder := self.folder(name, revision):
            siblings = [{"rfilename": file} for file in _files(folder)]
            self.send_json({"id": name, "sha": self.hub.models[name].commit(revision), "siblings": siblings})

    def send_tree(self, name: str, revision: str) -> None:
        if folder := self.folder(name, revision):
            rows = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": _etag(folder / file)}
                for file in _files(folder)
            ]
            self.send_json(rows)

    def send_file(self, name: str, revision: str, file: str) -> None:
        folder = self.folder(name, revision)
        if folder is None:
            return
        if locked := self.hub.models[name].locked:
            return self.refuse(*locked)
        if not (folder / file).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (folder / file).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{_etag(folder / file)}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            cuts = self.hub.cuts.get(file, [])
            end = start + cuts.pop(0) if cuts else len(content)
            self.wfile.write(content[start:end])
            self.close_connection = end < len(content)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
