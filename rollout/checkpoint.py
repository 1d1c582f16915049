"""What a checkpoint directory states: model type, context, vocabulary, end of sequence, tensor shapes."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from safetensors import safe_open

NATIVE_TYPES = ("deepseek_v3",)
"""Model types that `model.Transformer` implements; transformers reads all others."""


def read_config(path: Path | str, name: str = "config.json") -> dict[str, Any]:
    """A checkpoint's config.json, or its config of that `name`.

    Raises:
        FileNotFoundError: no such directory, or no such file in it.
        ValueError: a file that is not a JSON object.
    """
    file = Path(path) / name
    if not file.parent.is_dir():
        raise FileNotFoundError(f"no checkpoint directory {path}")
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {name}, so it is not a checkpoint directory")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a model config: {error!r}") from error


def model_type(path: Path | str) -> str:
    """The `model_type` of a checkpoint; raises as `read_config`, and ValueError where there is none."""
    try:
        return str(read_config(path)["model_type"])
    except KeyError as error:
        raise ValueError(f"{path}/config.json is not a model config with a model_type: {error!r}") from error


def context_of(path: Path | str) -> int | None:
    """A checkpoint's longest sequence, tokens, where its config.json states it."""
    config = read_config(path)
    keys = ("max_position_embeddings", "n_positions", "n_ctx")
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def context_and_vocabulary(path: Path | str, context: int) -> tuple[int, int]:
    """The longest sequence, at most `context` unless that is 0, and the number of token ids.
    Raises `ValueError`: config.json lacks one of them."""
    most, vocabulary = context_of(path) or context, read_config(path).get("vocab_size")
    if not most or vocabulary is None:
        raise ValueError(f"{path}/config.json lacks max_position_embeddings or vocab_size; add them there.")
    return min(context or most, most), int(vocabulary)


def eos_of(path: Path | str, tokenizer_eos: int | None = None) -> int | list[int] | None:
    """What ends a completion, for every engine and purpose: the eos of generation_config.json, which may list
    several, else of config.json; and the tokenizer's. Raises `FileNotFoundError` or `ValueError`: as
    `read_config`, of either file; or an eos that is no token id."""
    generation = (Path(path) / "generation_config.json").is_file()
    own = read_config(path, "generation_config.json") if generation else {}
    eos: Any = own.get("eos_token_id", read_config(path).get("eos_token_id"))
    ids = [i for i in (*(eos if isinstance(eos, list) else [eos]), tokenizer_eos) if i is not None]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: its eos_token_id {eos!r} is neither a token id nor a list of them")
    found = list(dict.fromkeys(ids))
    return found if len(found) > 1 else next(iter(found), None)


def eos_ids(path: Path | str, tokenizer_eos: int | None = None) -> frozenset[int]:
    """`eos_of`, all of them."""
    eos = eos_of(path, tokenizer_eos)
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def stored_shapes(path: Path | str, names: Container[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of those tensors of a checkpoint that are among `names`."""
    out: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found = [name for name in tensors.keys() if name in names]  # noqa: SIM118 - not a dict
            out |= {name: tuple(tensors.get_slice(name).get_shape()) for name in found}
    return out
