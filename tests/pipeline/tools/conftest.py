"""A server in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.tools.serve import Endpoint


@pytest.fixture(scope="session")
def running() -> Callable[[Endpoint], AbstractContextManager[tuple[str, int]]]:
    """A function: the endpoint answers at the address that it gives, and has ended afterwards."""
    from pipeline.tools.serve import listen

    @contextmanager
    def run(endpoint: Endpoint) -> Iterator[tuple[str, int]]:
        with listen(endpoint.config) as sock:
            address = sock.getsockname()
            thread = threading.Thread(target=lambda: asyncio.run(endpoint.server.serve([sock])), daemon=True)
            thread.start()
            try:
                yield address
            finally:
                endpoint.server.should_exit = True
                thread.join(timeout=20)
                assert not thread.is_alive(), "the server waits for something"

    return run
