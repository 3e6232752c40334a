"""A hub of one's own: serves directories as huggingface.co does, gated ones to one token only.

A process that is to use it must have `HF_ENDPOINT` set before it imports `huggingface_hub`.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class PretendHub(ThreadingHTTPServer):
    """Serves `models`, a directory for each hub name, at `main` and at `COMMIT`."""

    def __init__(self, models: dict[str, Path], *, gated: set[str], token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.gated, self.token = models, gated, token
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: PretendHub

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *arguments):
        pass

    def _answer(self):
        self.server.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._list("/".join(parts[2:4]))
        else:
            self._serve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _list(self, name: str):
        files = sorted(path for path in self.server.models[name].rglob("*") if path.is_file())
        entries = [
            {
                "type": "file",
                "path": path.relative_to(self.server.models[name]).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]
        self._send_json(entries)

    def _send_json(self, content: object):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _serve(self, name: str, revision: str, file: str):
        if name not in self.server.models:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if name in self.server.gated:
            given = self.headers.get("Authorization")
            if given != f"Bearer {self.server.token}":
                return self._send(403 if given else 401, b"", {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        path = self.server.models[name] / file
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
