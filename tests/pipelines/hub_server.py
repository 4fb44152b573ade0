"""A hub of one model on this machine: the three requests of huggingface_hub's downloads."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@contextmanager
def hub(folder: Path, hub_id: str, commit: str) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as the model `hub_id` at `commit`: (endpoint, names of the files given)."""
    given: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            resolve = f"/{hub_id}/resolve/{commit}/"
            if path == f"/api/models/{hub_id}/tree/{commit}":
                self._send(json.dumps(_listing(folder)).encode(), with_body)
            elif path.startswith(resolve) and (folder / path.removeprefix(resolve)).is_file():
                name = path.removeprefix(resolve)
                if with_body:
                    given.append(name)
                self._send((folder / name).read_bytes(), with_body, commit)
            else:
                code = "RepoNotFound" if hub_id not in path else "RevisionNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, content: bytes, with_body: bool, commit: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            if commit:
                self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", given
    finally:
        server.shutdown()
        server.server_close()


def _listing(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": file.relative_to(folder).as_posix(),
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
