"""`serve` and its clients: slow ones, too many, those that go away, and the end of the server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.settings.tools import ServeSettings
from pipeline.tools import serve
from pipeline.tools.conversation import Piece
from pipeline.tools.serve import Endpoint, listen
from rollout.engine import EngineDied
from tests.small import random_policy

SETTINGS = ServeSettings(model=Path("m"), name="m", port=0, timeout_s=1)
BODY = b'{"prompt": [3], "stream": true}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"


class Talk:
    """A conversation whose model says `text` every five milliseconds, `most` times."""

    def __init__(self, text: str = "a", most: int = 2000) -> None:
        self.text, self.most, self.said, self.error = text, most, 0, None
        self.tokenizer = type("Tokenizer", (), {"decode": lambda self, ids: "a"})()

    def check(self, ids: Any) -> None:
        pass

    def stream(self, *args: Any) -> Iterator[Piece]:
        for number in range(1, self.most + 1):
            time.sleep(0.005)
            self.said += 1
            if self.error:
                raise self.error
            yield Piece([("answer", self.text)], [5], [-1.0], "length" if number == self.most else "")


def connect(address: tuple[str, int], data: bytes = b"", timeout: float = 20) -> socket.socket:
    made = socket.create_connection(address, timeout=timeout)
    made.sendall(data)
    return made


def reply(connection: socket.socket) -> tuple[int, bytes, Any]:
    """Status, body (of a stream the first part) and headers of one answer."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read1(1000) if response.chunked else response.read()
    return response.status, body, response.headers


def rest(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def short_grace_and_no_key(monkeypatch):
    monkeypatch.setattr(serve, "GRACE_S", 0.5)
    monkeypatch.delenv("R1_API_KEY", raising=False)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_generation(running, stream):
    endpoint = Endpoint(SETTINGS, talk := Talk())
    with running(endpoint) as address:
        body = json.dumps({"prompt": [3], "stream": stream, "max_tokens": 9}).encode()
        connection = connect(address, HEAD % len(body) + body)
        until(lambda: talk.said > 5)
        connection.close()
        until(lambda: not endpoint.server.server_state.tasks)
        said = talk.said
        time.sleep(0.1)
        assert talk.said <= said + 1


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", HEAD[:-2] % 9])
def test_a_client_that_sends_no_request_is_closed(running, sent):
    with running(Endpoint(SETTINGS, Talk())) as address:
        start = time.monotonic()
        assert rest(connect(address, sent)) == b""
        assert 0.5 < time.monotonic() - start < 10


def test_a_client_that_sends_no_body_gets_a_408_and_is_closed(running):
    with running(Endpoint(SETTINGS, Talk())) as address:
        answer = rest(connect(address, HEAD % 100 + b'{"prompt"'))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"not complete after 1 s" in answer


def test_a_client_that_does_not_read_is_closed(running):
    endpoint = Endpoint(SETTINGS, talk := Talk("a" * 1_000_000))
    with running(endpoint) as address:
        connection = connect(address, HEAD % len(BODY) + BODY)
        until(lambda: talk.said > 0)
        until(lambda: not endpoint.server.server_state.tasks)
        assert not endpoint.server.server_state.connections and connection


def test_a_client_that_waits_for_its_answer_is_not_closed(running):
    endpoint = Endpoint(SETTINGS, talk := Talk(most=600))  # three seconds
    with running(endpoint) as address:
        body = b'{"prompt": [3]}'
        connection = connect(address, HEAD % len(body) + body)
        assert reply(connection)[0] == 200 and talk.said == 600


def test_a_connection_serves_requests_for_longer_than_its_time(running):
    with running(Endpoint(SETTINGS, Talk(most=1))) as address:
        connection = connect(address)
        for _ in range(12):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert reply(connection)[0] == 200
            time.sleep(0.2)


FRAMING = b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"


@pytest.mark.parametrize("data", [b"garbage\r\n\r\n", FRAMING % b"/v1/completions", FRAMING % b"/none"])
def test_what_is_not_http_is_a_400_and_no_traceback(running, caplog, data):
    with running(Endpoint(SETTINGS, Talk(most=1))) as address:
        assert rest(connect(address, data)).startswith(b"HTTP/1.1 400 ")
        assert reply(connect(address, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"))[0] == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_too_long_a_request_is_a_413_and_takes_no_memory(running, monkeypatch):
    monkeypatch.setattr(serve, "MOST_BYTES", 1000)
    with running(Endpoint(replace(SETTINGS, timeout_s=20), Talk(most=1))) as address:
        for size, status in ((1000, 200), (1001, 413), (5_000_000, 413)):
            body = b'{"prompt": [3]' + b" " * (size - 15) + b"}"
            assert len(body) == size
            connection = connect(address, HEAD % size + body)
            assert reply(connection)[0] == status


def test_too_many_requests_get_a_429(running):
    endpoint = Endpoint(replace(SETTINGS, max_requests=2), Talk())
    with running(endpoint) as address:
        open_ones = [connect(address, HEAD % len(BODY) + BODY) for _ in range(2)]
        until(lambda: len(endpoint.server.server_state.tasks) == 2)
        status, body, headers = reply(connect(address, HEAD % len(BODY) + BODY))
        assert status == 429 and b"rate_limit_exceeded" in body and headers["retry-after"] == "1"
        open_ones.pop().close()
        until(lambda: len(endpoint.server.server_state.tasks) == 1)
        assert reply(connect(address, HEAD % len(BODY) + BODY))[0] == 200


def test_above_the_most_clients_those_that_wait_are_closed(running, monkeypatch):
    monkeypatch.setattr(serve, "MOST_CLIENTS", 4)
    endpoint = Endpoint(replace(SETTINGS, timeout_s=60), Talk())
    with running(endpoint) as address:
        at_work = connect(address, HEAD % len(BODY) + BODY)
        idle = [connect(address) for _ in range(8)]
        assert [rest(connection) for connection in idle] == [b""] * 8
        assert reply(at_work)[0] == 200 and len(endpoint.server.server_state.tasks) == 1


@pytest.mark.parametrize(
    "error", [EngineDied("the engine died"), FloatingPointError("NaN"), ValueError("room")]
)
def test_an_engine_that_fails_is_an_error_in_the_same_shape(running, error):
    endpoint = Endpoint(SETTINGS, talk := Talk())
    with running(endpoint) as address:
        connection = connect(address, HEAD % len(BODY) + BODY)
        until(lambda: talk.said > 5)
        talk.error = error
        assert events_of(connection)[-1]["error"]["message"] == str(error)
        status = reply(connect(address, HEAD % len(BODY) + BODY))[0]
        assert status == (400 if isinstance(error, ValueError) else 500)


def events_of(connection: socket.socket) -> list[Any]:
    """The events of a stream, up to its last chunk."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += connection.recv(1 << 16)
    return [json.loads(line[6:]) for line in data.split(b"\r\n") if line.startswith(b"data: {")]


def test_the_end_of_the_server_ends_requests(running):
    """`running` fails where the server does not end."""
    endpoint = Endpoint(replace(SETTINGS, timeout_s=600), talk := Talk())
    with running(endpoint) as address:
        going = connect(address, HEAD % len(BODY) + BODY)
        unfinished = [connect(address, sent) for sent in (b"", b"POST ", HEAD % 100)]
        until(lambda: talk.said > 5 and len(endpoint.server.server_state.connections) == 4)
    assert events_of(going)[-1]["error"]["message"] == "the server ends"
    assert [rest(connection) for connection in unfinished] == [b""] * 3


def test_an_address_that_is_not_available_is_a_user_error():
    with listen(SETTINGS) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1:{port}: Address already in use; choose another"):
            listen(replace(SETTINGS, port=port))
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid:0: .*choose another --host"):
        listen(replace(SETTINGS, host="no.such.host.invalid"))
    with pytest.raises(UserError, match="choose another --host"):
        listen(replace(SETTINGS, host="a" * 70))


@pytest.mark.parametrize("wrong", [{"host": ""}, {"port": 70_000}, {"api_key": "a b"}, {"api_key": "ß"}])
def test_wrong_settings_are_refused_and_no_key_is_shown(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as said:
        replace(SETTINGS, **wrong)
    assert "api_key" not in wrong or wrong["api_key"] not in str(said.value)
    assert "hidden" not in repr(replace(SETTINGS, api_key="hidden"))


def test_vllms_server_gets_the_key_but_not_in_its_command_line(monkeypatch):
    monkeypatch.setattr(serve, "server_flags", lambda *args: [])
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("R1_API_KEY", "from the environment")
    for key, expected in (("hidden", "hidden"), ("", "from the environment")):
        assert not any("hidden" in part for part in serve.vllm_command(replace(SETTINGS, api_key=key)))
        assert os.environ["VLLM_API_KEY"] == expected


def test_the_command_serves_until_ctrl_c(tokenizer, tmp_path, root):
    folder = random_policy(tmp_path, tokenizer, "r1", max_position_embeddings=128)
    command = [sys.executable, "-m", "pipeline", "serve", "--model", str(folder), "--port", "0"]
    env = {**os.environ, "R1_API_KEY": "hidden", "PYTHONPATH": str(root)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--threads", "1"], env=env, cwd=root, **pipes) as process:
        line = process.stdout.readline()
        host, port = line.split("http://")[1].split("/")[0].split(":")
        status, *_ = reply(connect((host, int(port)), HEAD % len(BODY) + BODY))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (
        status == 401
        and process.returncode == 130
        and err.split() == ["interrupted"]
        and "hidden" not in line + out
    )


def test_without_fastapi_the_command_names_what_to_install(root):
    code = "import sys; sys.modules['fastapi'] = None; from pipeline.__main__ import main; "
    code += "sys.exit(main(['serve', '--model', 'm']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: serve needs fastapi, which is not installed"
    )
    assert len(done.stderr.splitlines()) == 1
