"""A hub on this machine: what huggingface_hub asks of one, and what of each file was read."""

from __future__ import annotations

import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """One model, ``some/body``, out of a folder; everything else is not there."""

    def __init__(self, folder: Path, ranges: bool = True, gated: bool = False) -> None:
        """At any free port of this machine.

        Args:
            ranges: whether parts of files are given where they are asked for.
            gated: whether nobody may have anything.
        """
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.ranges, self.gated = folder, ranges, gated
        self.sent: Counter[str] = Counter()
        """Bytes of each file."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        file = re.fullmatch(r"/some/body/resolve/[^/]+/(.+)", path)
        if self.server.gated:
            self._send(
                403, b"", body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access first"}
            )
        elif re.fullmatch(r"/api/models/some/body(/revision/[^/]+)?", path):
            self._send(200, json.dumps(self._listed()).encode(), body)
        elif file and (self.server.folder / file[1]).is_file():
            self._send_file(file[1], body)
        else:
            self._send(404, b"", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})

    def _listed(self) -> dict[str, Any]:
        files = sorted(file for file in self.server.folder.rglob("*") if file.is_file())
        named = [(file.relative_to(self.server.folder).as_posix(), file.stat().st_size) for file in files]
        siblings = [{"rfilename": name, "size": size} for name, size in named]
        return {"id": "some/body", "modelId": "some/body", "sha": COMMIT, "siblings": siblings}

    def _send_file(self, name: str, body: bool) -> None:
        whole = (self.server.folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(whole)}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            first, last = int(asked[1]), int(asked[2])
            part = whole[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(whole)}"
            self._send(206, part, body, headers, name)
        else:
            self._send(200, whole, body, headers, name)

    def _send(
        self, code: int, text: bytes, body: bool, headers: dict[str, str] | None = None, name: str = ""
    ) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(text))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.server.sent[name] += len(text)
            self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        """Nothing on stderr."""
