"""A fake model hub: the address under which huggingface_hub asks for one file of a model, over real HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[int, str], str | None]
"""(number of the request, its method) -> None or a fault's name:
500 503 429 401 403 404; repo gated disabled (what the hub says of a model); portal (a page that is no hub's); hang."""

_SAYS = {"repo": (401, "RepoNotFound", "Repository not found"), "gated": (403, "GatedRepo", "Access is restricted"),
         "disabled": (403, "", "Access to this resource is disabled.")}


class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.url` until the block ends or `stop`.

    `commits` are {repo: {commit: {file: text}}}, `refs` {(repo, branch): commit}. As the real hub does, it redirects
    from the revision to the commit, and says where a thing is missing: model, revision or file.
    """

    def __init__(self, fault: Fault | None = None) -> None:
        self.commits: dict[str, dict[str, dict[str, str]]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault = fault
        self._released = threading.Event()
        self._connections: list[socket.socket] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                hub._connections.append(self.connection)

            def do_HEAD(self) -> None:
                hub.requests.append((self.command, self.path))
                fault = hub.fault(len(hub.requests), self.command) if hub.fault else None
                if fault == "hang":
                    hub._released.wait(20)
                    self.close_connection = True
                elif fault == "portal":
                    self.reply(200, b"<html>log in to the wireless network</html>", {})
                elif fault in _SAYS:
                    status, code, message = _SAYS[fault]
                    self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": message})
                elif fault:
                    self.reply(int(fault), b"", {})
                else:
                    self.reply(*hub._answer(self.path))

            do_GET = do_HEAD

            def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def add(self, repo: str, commit: str, text: str | None, branch: str | None = "main",
            name: str = "generation_config.json") -> None:
        """A commit with a file, or without it where `text` is None; the head of `branch`."""
        self.commits.setdefault(repo, {})[commit] = {} if text is None else {name: text}
        if branch:
            self.refs[repo, branch] = commit

    def _answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        cached = path.startswith("/api/resolve-cache/models/")
        parts = path.removeprefix("/api/resolve-cache/models/" if cached else "/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:] if cached else parts[3:]
        commits = self.commits.get(repo)
        if commits is None:
            return 401, b"", {"X-Error-Code": "RepoNotFound"}
        commit = self.refs.get((repo, rest[0]), rest[0])
        if commit not in commits:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        text = commits[commit].get(rest[1])
        if text is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        body = text.encode()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        if cached:
            return 200, body, headers
        return 307, b"", headers | {"Location": f"/api/resolve-cache/models/{repo}/{commit}/{rest[1]}",
                                    "X-Linked-Size": str(len(body))}

    def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:  # those kept alive too
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
