"""Rows of the hub's data sets, downloaded or from its cache."""

import functools
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

from pipeline.data.jsonl import JsonObject
from pipeline.errors import UserError

Located = tuple[str, JsonObject]
"""A row with its place, for errors."""


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the hub keeps a data set."""

    path: str
    split: str
    config: str | None = None


def parse_hub(source: str) -> Hub:
    """`hub:OWNER/NAME[:CONFIG]:SPLIT`."""
    _, *parts = source.split(":")
    if len(parts) not in (2, 3):
        raise UserError(f"{source}: the form is hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT")
    return Hub(parts[0], parts[-1], parts[1] if len(parts) == 3 else None)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached, directly or by a proxy; tried once, for at most 5 s."""
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), 5).close()
    except OSError:
        return False
    return True


def hub_rows(hub: Hub) -> Iterator[Located]:
    """The rows of a hub data set.

    Raises:
        UserError: it is neither in reach nor in the cache.
    """
    import datasets  # takes seconds to import, and most sources do not need it
    from huggingface_hub import constants

    if not hub_answers():  # read the cache, and do not retry for half a minute a data set
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the hub client raises a dozen unrelated types, offline and online
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UserError(
            f"the hub data set {hub.path} cannot be read ({type(error).__name__}: {reason})"
        ) from error
    return ((f"{hub.path} ({hub.split}) row {i}", row) for i, row in enumerate(rows))
