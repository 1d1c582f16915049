"""Soft overlong punishment (DAPO, arXiv:2503.14476, Eq. 13)."""

from __future__ import annotations


def soft_overlong(tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Reward in [-1, 0] for a completion of `tokens` tokens: 0 up to the buffer, then a ramp down to -1.

        0                                       tokens <= max - buffer
        ((max - buffer) - tokens) / buffer      max - buffer < tokens <= max
        -1                                      max < tokens

    Args:
        tokens: Length of the completion, tokens.
        max_tokens: The paper's L_max, tokens.
        buffer_tokens: The paper's L_cache: the ramp's length, tokens. 0 = a step at `max_tokens`.

    Raises:
        ValueError: The buffer is negative or longer than `max_tokens`.
    """
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must lie in 0 .. max_tokens={max_tokens}.")
    free = max_tokens - buffer_tokens
    if tokens <= free:
        return 0.0
    if tokens > max_tokens:
        return -1.0
    return (free - tokens) / buffer_tokens
