"""A little Hub: what the real client asks of it when it downloads a repository, answered from memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MODEL = "org/model"


def commit_of(number: int) -> str:
    """A commit's hash."""
    return f"{number:040x}"


class Hub:
    """Commits of one repository; `main` is the last. `status`: answer everything with this instead.

    `sent` lists the files that were sent.
    """

    def __init__(self) -> None:
        self.commits: list[Mapping[str, bytes]] = []
        self.status: tuple[int, str] | None = None
        self.sizes: dict[str, int] = {}  # that are claimed, where they are not those of the bytes
        self.sent: list[str] = []
        self.url = ""

    def commit(self, folder: Path) -> str:
        """Add what is in a folder; returns the commit's hash."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        self.commits.append({str(file.relative_to(folder)): file.read_bytes() for file in files})
        return commit_of(len(self.commits))

    def find(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        hashes = [commit_of(i + 1) for i in range(len(self.commits))]
        commit = hashes[-1] if revision == "main" and hashes else revision
        return (commit, self.commits[hashes.index(commit)]) if commit in hashes else None


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty Hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str], *, body: bool) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _refuse(self, status: int, code: str, *, body: bool) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, body=body)

        def _answer(self, *, body: bool) -> None:
            if hub.status is not None:
                self._refuse(*hub.status, body=body)
                return
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            parts = parts[2:] if is_api else parts
            if "/".join(parts[:2]) != MODEL:
                self._refuse(404, "RepoNotFound", body=body)
                return
            kind, revision, name = parts[2], parts[3], "/".join(parts[4:])
            found = hub.find(revision)
            if found is None:
                self._refuse(404, "RevisionNotFound", body=body)
            elif is_api:
                self._send(200, json.dumps(_facts(hub, kind, *found)).encode(), {}, body=body)
            elif name not in found[1]:
                self._refuse(404, "EntryNotFound", body=body)
            else:
                hub.sent += [name] if body else []
                content = found[1][name]
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found[0]}
                self._send(200, content, headers, body=body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _facts(hub: Hub, kind: str, commit: str, files: Mapping[str, bytes]) -> object:
    """What the Hub says of a repository at a commit, or of its files."""
    sizes = {name: hub.sizes.get(name, len(content)) for name, content in files.items()}
    if kind == "tree":
        return [
            {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(files[name]).hexdigest()}
            for name, size in sizes.items()
        ]
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    return {"id": MODEL, "modelId": MODEL, "sha": commit, "private": False, "siblings": siblings}
