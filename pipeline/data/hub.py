"""Data sets and models of the hub, downloaded or from its cache."""

import functools
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from pipeline.data.jsonl import Located
from pipeline.errors import UserError


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
    """The rows of a hub data set. Raises `UserError`: it is neither in reach nor in the cache."""
    import datasets  # takes seconds to import, and most sources do not need it
    from huggingface_hub import constants

    if not hub_answers():  # read the cache, and do not retry for half a minute a data set
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # the hub client raises a dozen unrelated types, offline and online
        raise UserError(f"the hub data set {hub.path} cannot be read ({reason(error)})") from error
    return ((f"{hub.path} ({hub.split}) row {i}", row) for i, row in enumerate(rows))


MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What a checkpoint needs; repositories hold the same weights in other formats too."""


def is_model_name(value: str) -> bool:
    """Whether `value` is a hub model's name, `OWNER/NAME`, and no path: there is no directory OWNER here."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value)) and not Path(value).parent.is_dir()


def hub_model(name: str, revision: str | None = None) -> Path:
    """The directory of hub model `name`; its last part is the hash of the revision: of `revision`, or, for
    None, of the newest where the hub can be reached, else of what the cache has. Raises `UserError`: it is
    neither in reach nor in the cache."""
    from huggingface_hub import snapshot_download

    offline = not hub_answers()
    which: Any = {"allow_patterns": [*MODEL_FILES], "local_files_only": offline}
    try:
        return Path(snapshot_download(name, revision=revision, **which))
    except Exception as error:  # as above
        why = "the hub is out of reach and its cache has no copy" if offline else reason(error)
        raise UserError(
            f"no directory {name} here, and the hub model {name} cannot be read ({why}); go online so that "
            f"it can be downloaded, or copy its files from elsewhere and name their directory"
        ) from error


def reason(error: Exception) -> str:
    """Type and first line of an error of the hub's client, which has many."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
