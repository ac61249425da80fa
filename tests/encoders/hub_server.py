"""A Hugging Face hub on this machine, with one checkpoint in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

COMMIT = "c" * 40


@contextmanager
def hub_with(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the files of `folder` as the checkpoint `name`; yields the paths of all requests."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            head, _, rest = self.path.partition(f"/{name}/resolve/")
            path = folder / rest.partition("/")[2]
            files = sorted(folder.iterdir())
            if self.path.startswith(f"/api/models/{name}/tree/"):
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                self._send(json.dumps(tree).encode())
            elif self.path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file.name} for file in files]
                self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            elif not head and path.is_file():
                self._send(path.read_bytes())
            else:
                self.send_error(404)

        do_HEAD = do_GET  # noqa: N815 (the name that the server calls)

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield asked
        finally:
            server.shutdown()
