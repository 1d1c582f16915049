"""An OpenAI-compatible API in a thread that answers as a test tells it to, faults included."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body. A header `Content-Length` above the body's is a connection that breaks off."""


def chat(
    content: str | None = "4", reason: str | None = "stop", tokens: int | None = 7, **message: Any
) -> Reply:
    """A chat completion."""
    choice = {
        "index": 0,
        "finish_reason": reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return 200, {}, json.dumps({"id": "x", "choices": [choice], **usage}).encode()


def error(status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> Reply:
    """An error in OpenAI's shape."""
    return status, headers or {}, json.dumps({"error": {"message": message, **more}}).encode()


class FakeEndpoint:
    """`says(body, n)` is the reply to the n-th chat request, counted from 0; `None` = it never answers."""

    def __init__(self, says: Callable[[dict[str, Any], int], Reply | None]) -> None:
        self.says, self.models = says, (200, {}, b'{"data": [{"id": "m"}, {"id": "other"}]}')
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    def reply(self, path: str, body: bytes, key: str | None) -> Reply | None:
        """The answer to a request."""
        if path == "/v1/models":
            return self.models
        if path != "/v1/chat/completions":
            return 404, {}, b"nothing here"
        with self.lock:
            n = len(self.bodies)
            self.bodies.append(json.loads(body))
            self.keys.append(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.says(self.bodies[n], n)
        finally:
            with self.lock:
                self.at_once -= 1


def send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes) -> None:
    """Send a reply."""
    handler.send_response(status)
    own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    for name, value in (own | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


@contextmanager
def running(fake: FakeEndpoint) -> Iterator[str]:
    """The address of `fake` while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = fake.reply(self.path, body, self.headers.get("Authorization"))
            if found is None:
                fake.ended.wait()
                return
            send(self, *found)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        fake.ended.set()
        server.shutdown()
        server.server_close()
