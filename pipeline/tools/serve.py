"""`python -m pipeline serve --model DIR`: an endpoint with OpenAI's protocol.

Where vLLM is installed, vLLM's own server runs, with the settings that our models need. Elsewhere FastAPI
and uvicorn serve our engines. Concurrent requests alternate, a few tokens each, in the one thread that uses
the engine; the generation for a client that is gone ends with the piece under way.
"""

import asyncio
import hmac
import importlib.util
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pipeline.errors import UserError
from pipeline.settings.tools import ServeSettings
from pipeline.tools.conversation import Conversation
from pipeline.tools.open import check_model
from pipeline.tools.serve_api import ChatBody, Refused, TextBody, join_chunks, parse_body, respond
from rollout.engine import EngineDied
from rollout.vllm.options import server_flags

try:
    import h11
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    raise UserError(f"serve needs {error.name}, which is not installed: pip install -e '.[serve]'") from error

MOST_BYTES = 4 << 20
"""Longest request."""
MOST_CLIENTS = 800
"""Connections; with more, those that wait are closed. A process may usually open 1,024 files."""
GRACE_S = 5
"""Seconds from the answer to a client that is too slow to the end of its connection."""


class Server(uvicorn.Server):
    """Closes connections that wait for too long for their client: to send a request, to read an answer."""

    since: dict[Any, tuple[Any, float]] | None = None
    """For what each connection waits, and from when on (seconds of the monotonic clock)."""

    def waiting(self) -> dict[Any, Any]:
        """Connections that wait for their client, each with what changes when the client goes on."""
        clients: list[Any] = [*self.server_state.connections]
        marks = {c: (c.cycle, c.conn.their_state, c.transport.get_write_buffer_size()) for c in clients}
        return {c: mark for c, mark in marks.items() if mark[1] in (h11.IDLE, h11.SEND_BODY) or mark[2]}

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        now, before = time.monotonic(), self.since or {}
        self.since = {
            c: (m, now) if before.get(c, (0,))[0] != m else before[c] for c, m in self.waiting().items()
        }
        longest = self.config.timeout_keep_alive + GRACE_S
        crowd = len(self.server_state.connections) > MOST_CLIENTS
        for client in [c for c, (_, start) in self.since.items() if now - start > (1 if crowd else longest)]:
            client.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for no client."""
        for client in self.waiting():
            client.transport.abort()
        await super().shutdown(sockets)


class Endpoint:
    """What the routes of one model do, and the server that they belong to."""

    def __init__(self, config: ServeSettings, talk: Conversation) -> None:
        self.config, self.talk, self.name = config, talk, model_name(config)
        self.key, self.worker = api_key(config), ThreadPoolExecutor(1, "engine")
        app = FastAPI(openapi_url=None)
        for kind in (Refused, HTTPException, Exception):
            app.exception_handler(kind)(refuse)
        app.add_route("/health", lambda request: JSONResponse({}))
        app.add_route("/v1/models", self.models)
        app.add_route("/v1/models/{name:path}", self.models)
        app.add_route("/v1/completions", partial(self.answer, TextBody), methods=["POST"])
        app.add_route("/v1/chat/completions", partial(self.answer, ChatBody), methods=["POST"])
        logging.getLogger("uvicorn.error").addFilter(of_the_server)
        self.server = Server(
            uvicorn.Config(
                app, http="h11", ws="none", lifespan="off", log_config=None, log_level="error",
                access_log=False, server_header=False, timeout_keep_alive=config.timeout_s,
            )
        )  # fmt: skip

    def authorize(self, request: Request) -> None:
        """Refuse a request without the key."""
        given = request.headers.get("authorization", "").encode()
        if self.key and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refused(401, "the API key is missing or wrong", None, "invalid_api_key")

    def check_name(self, name: str) -> None:
        """Refuse another model's name."""
        if name != self.name:
            raise Refused(404, f"no model {name[:200]!r}; there is {self.name}", "model", "model_not_found")

    async def models(self, request: Request) -> Response:
        """The list of models, or one of them."""
        self.authorize(request)
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "r1-pipeline"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self.check_name(request.path_params["name"])
        return JSONResponse(card)

    async def answer(self, kind: type[TextBody] | type[ChatBody], request: Request) -> Response:
        """The answer to a request, or its error where that is known before the first token."""
        self.authorize(request)
        if len(self.server.server_state.tasks) > (most := self.config.max_requests):
            raise Refused(429, f"{most} requests are open; try again later", None, "rate_limit_exceeded")
        try:
            body = parse_body(kind, await self.read(request))
            self.check_name(body.model or self.name)
            chunks = self.generate(request, respond(self.talk, self.config, self.name, body))
            first = await anext(chunks)
            if body.stream:
                return StreamingResponse(events(first, chunks), media_type="text/event-stream")
            return JSONResponse(join_chunks([first, *[chunk async for chunk in chunks]]))
        except ClientDisconnect:
            return Response()

    async def read(self, request: Request) -> bytes:
        """The body. One that is too long is read to its end: before that, no client looks for an answer."""
        data = bytearray()
        try:
            async with asyncio.timeout(self.config.timeout_s):
                async for part in request.stream():
                    data += part if len(data) <= MOST_BYTES else b""
        except TimeoutError:
            raise Refused(408, f"the request is not complete after {self.config.timeout_s} s") from None
        if len(data) > MOST_BYTES:
            raise Refused(413, f"the request is over {MOST_BYTES:,} bytes")
        return bytes(data)

    async def generate(self, request: Request, chunks: Iterator[Any]) -> AsyncIterator[Any]:
        """The chunks, each computed in the engine's thread. Raises `ClientDisconnect`: the client is gone."""
        loop = asyncio.get_running_loop()
        while (chunk := await loop.run_in_executor(self.worker, self.step, chunks)) is not None:
            yield chunk
            if await request.is_disconnected():
                raise ClientDisconnect

    def step(self, chunks: Iterator[Any]) -> Any:
        """The next chunk, `None` after the last."""
        if self.server.should_exit:
            raise Refused(503, "the server ends")
        try:
            return next(chunks, None)
        except (ValueError, FloatingPointError, EngineDied) as error:
            raise Refused(400 if isinstance(error, ValueError) else 500, str(error)) from error


async def events(first: Any, chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The events of a stream; that with the usage where the others have a key for it."""
    try:
        yield f"data: {json.dumps(first)}\n\n"
        async for chunk in chunks:
            if chunk["choices"] or "usage" in first:
                yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    except ClientDisconnect:
        return


async def refuse(request: Request, error: Exception) -> Response:
    """An error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    elif not isinstance(error, Refused):
        error = Refused(500, f"{type(error).__name__} in the server; its log has more")
    headers = {408: {"connection": "close"}, 429: {"retry-after": "1"}}
    return JSONResponse(error.body, error.status, headers.get(error.status))


def of_the_server(record: logging.LogRecord) -> bool:
    """Whether a log entry is not a client's doing: uvicorn shows bad framing as an error of the app."""
    return not (record.exc_info and isinstance(record.exc_info[1], h11.LocalProtocolError))


def listen(config: ServeSettings) -> socket.socket:
    """A socket that takes connections; they wait until the server runs.
    Raises `UserError`: the address is not available."""
    try:
        family, *_, where = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(2048)
        return sock
    except (OSError, UnicodeError) as error:
        reason, address = getattr(error, "strerror", None) or error, f"{config.host}:{config.port}"
        raise UserError(f"cannot listen on {address}: {reason}; choose another --host or --port") from error


def model_name(config: ServeSettings) -> str:
    """The model's name in requests."""
    folder = config.model.resolve()
    return config.name or (folder.parent.name if folder.name == "model" else folder.name)


def api_key(config: ServeSettings) -> str:
    """What a client must send; empty = nothing."""
    return config.api_key or os.environ.get("R1_API_KEY", "")


def vllm_command(config: ServeSettings) -> list[str]:
    """vLLM's own server, set up as `rollout.vllm.engine` sets up its engine; its environment too."""
    if key := api_key(config):
        os.environ["VLLM_API_KEY"] = key  # other users of the machine can read a command line
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(config.model)]
    command += ["--served-model-name", model_name(config), "--host", config.host, "--port", str(config.port)]
    return command + server_flags(config.model, config.dtype, config.vllm)


def main(config: ServeSettings) -> None:
    """The command; runs until Ctrl-C."""
    check_model(config.model, config.engine)
    installed = importlib.util.find_spec("vllm") is not None
    if config.engine == "vllm" or (config.engine == "auto" and installed):
        if not installed:
            raise UserError("vLLM is not installed here; make .venv-vllm/stamp, and take its bin/python")
        command = vllm_command(config)
        os.execv(command[0], command)  # Ctrl-C and exit code are vLLM's
    with listen(config) as sock:
        endpoint = Endpoint(config, Conversation(config))
        host, port = sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving {endpoint.name} at http://{host}:{port}/v1 (Ctrl-C ends it)", flush=True)
        try:
            endpoint.server.run(sockets=[sock])
        finally:
            endpoint.worker.shutdown(cancel_futures=True)
            endpoint.talk.engine.close()
