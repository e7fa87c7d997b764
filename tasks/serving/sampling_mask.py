"""The engine's own record of what a step could have sampled: the ids that native truncation kept, and the
log-probability with which the sampled one was drawn from them.

A request asks for it with `"return_sampling_mask": true`. SGLang needs no flag for it and gives it with and without
deterministic inference, with and without `return_logprob`; it refuses (400) a request whose `top_k` is not set or not
within the limits below, and one with a custom logit processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

GREEDY_TOP_K = 1
"""`top_k: 1` or `temperature: 0`: every mask is the one id, every log-probability 0."""
SMALLEST_TOP_K = 2
LARGEST_TOP_K = 4096
"""What servers allow unless started with another `--sampling-mask-max-tokens` (`sampling_mask_max_tokens` of
/server_info). A kept set that ties at the cut make larger than that ends the request as a 400."""

_ABOVE_ZERO = 1e-5  # what float32 may make of log(1)


def read_mask(meta_info: Mapping[str, Any]) -> tuple[list[list[int]], list[float] | None]:
    """Kept ids and behaviour log-probabilities of a reply, from the `meta_info` of /generate.

    Returns one list of token ids per output token, likeliest first, and per output token the natural logarithm of the
    sampled id's probability among the kept ones (after temperature, renormalised; float32 on the server), or None from
    a server that gives none. `output_token_logprobs` are others: of the whole vocabulary, before truncation.

    Raises ValueError where there is no mask or it contradicts itself or the rest of the reply.
    """
    masks = meta_info.get("output_token_sampling_mask")
    if masks is None:
        raise ValueError("the reply has no sampling mask; the request needs return_sampling_mask: true")
    if not isinstance(masks, list):
        raise ValueError(f"output_token_sampling_mask is a {type(masks).__name__}, not a list")
    for step, kept in enumerate(masks):
        _check_kept(step, kept)
    for name in ("output_token_sampling_mask_length", "completion_tokens"):
        if (count := meta_info.get(name)) is not None and count != len(masks):
            raise ValueError(f"{len(masks)} sampling masks, but {name} is {count}")
    _check_sampled(masks, meta_info.get("output_token_logprobs"))
    return masks, _read_logprobs(meta_info.get("output_token_sampling_logprobs"), len(masks))


def _check_kept(step: int, kept: Any) -> None:
    if not isinstance(kept, list) or not kept or not all(type(i) is int and i >= 0 for i in kept):
        raise ValueError(f"the sampling mask of step {step} is not a list of token ids")
    if len(set(kept)) != len(kept):
        raise ValueError(f"the sampling mask of step {step} names an id twice")


def _check_sampled(masks: list[list[int]], entries: Any) -> None:
    """The sampled ids, where the reply has them (`return_logprob`), are among the kept ones."""
    if not entries:
        return
    try:
        sampled = [entry[1] for entry in entries]
    except (TypeError, IndexError, KeyError):
        raise ValueError("output_token_logprobs is not a list of [logprob, id, text]") from None
    if len(sampled) != len(masks):
        raise ValueError(f"{len(masks)} sampling masks for {len(sampled)} output tokens")
    for step, (token, kept) in enumerate(zip(sampled, masks, strict=True)):
        if token not in kept:
            raise ValueError(f"step {step} sampled {token}, which its sampling mask does not keep")


def _read_logprobs(values: Any, steps: int) -> list[float] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(v) in (float, int) for v in values):
        raise ValueError("output_token_sampling_logprobs is not a list of numbers (sampling_logprobs_mode: selected)")
    if len(values) != steps:
        raise ValueError(f"{steps} sampling masks, but {len(values)} log-probabilities")
    if not all(math.isfinite(v) and v <= _ABOVE_ZERO for v in values):
        raise ValueError("output_token_sampling_logprobs has a value that is no log-probability")
    return [float(v) for v in values]
