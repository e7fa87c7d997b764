"""Truncation of next-token logits: the seven processors of a sampling heuristic.

The definitions are those of Hugging Face transformers (TemperatureLogitsWarper, TopKLogitsWarper, ...). On
one CPU thread the results equal theirs to the last bit: the order of operations below is part of the
definition, as a sum taken in another order moves a token across the cut.

Everything here is a pure function of fp32 logits of shape (rows, vocab). A cut token gets -inf; a row that
comes in with a finite logit leaves with one. The logit processor ships this file's text to inference servers,
so it may import nothing but torch and the standard library.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Step = tuple[str, float, int]
"""One processor as executed: (name, value, min_tokens_to_keep)."""

_FP32_MAX = 3.4028234663852886e38
_FP32_TINY = 1.1754943508222875e-38
# From this temperature up, logits below 3.4e32 cannot overflow fp32 when divided.
_OVERFLOW_TEMPERATURE = 1e-6


def temperature(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """Divide by the temperature. `values` (n, 1): temperatures; here and below n is 1 or the rows."""
    return logits / values


def _tiny_temperature(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """`temperature`, shifting those rows to a maximum of 0 whose maximum the division would drive to ±inf.

    A temperature of 0 (here: -1) keeps the likeliest token alone, the first of several: greedy decoding.
    """
    likeliest = torch.arange(logits.shape[-1], device=logits.device) == logits.argmax(dim=-1, keepdim=True)
    greedy = logits.masked_fill(~likeliest, -math.inf)
    zero, values = values < 0, values.clamp(min=_FP32_TINY)
    top = logits.amax(dim=-1, keepdim=True)
    shift = torch.where(torch.isfinite(top) & torch.isinf(top / values), top, torch.zeros_like(top))
    return torch.where(zero, greedy, (logits - shift) / values)


def top_k(logits: Tensor, values: Tensor, largest: int) -> Tensor:
    """Keep the logits not below the k-th largest. `values` (n, 1): k, or inf for k >= vocab.

    `largest` is the greatest finite k, 0 if there is none; min_tokens_to_keep is part of k.
    """
    if largest == 0:
        return logits.clone()
    ranked = torch.topk(logits, largest, dim=-1).values
    # A row with k >= vocab cuts nothing: any rank may be looked up, as its threshold is replaced by -inf.
    rank = values.clamp(max=largest).long().expand(logits.shape[0], 1) - 1
    threshold = ranked.gather(1, rank).masked_fill(torch.isinf(values), -math.inf)
    return logits.masked_fill(logits < threshold, -math.inf)


def top_p(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """Cut the least likely tokens whose cumulative probability is at most 1 - p. `values` (n, 1): 1 - p."""
    ascending, order = torch.sort(logits, descending=False)
    cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= values
    cut[..., -keep:] = False
    return logits.masked_fill(cut.scatter(1, order, cut), -math.inf)


def min_p(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """Cut the tokens below a fraction of the highest probability. `values` (n, 1): that fraction."""
    probs = logits.softmax(dim=-1)
    cut = probs < values * probs.amax(dim=-1, keepdim=True)
    if keep > 1:  # The most likely token never falls below its own fraction.
        kept = torch.topk(probs, keep, dim=-1).indices
        cut.scatter_(-1, kept, False)
    return logits.masked_fill(cut, -math.inf)


def typical(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """Keep the tokens whose surprise is nearest the entropy, up to a mass. `values` (n, 1): the mass.

    Locally typical sampling, Meister et al. 2023, https://arxiv.org/abs/2202.00666.
    """
    log_probs = torch.log_softmax(logits, dim=-1)
    # nansum, for 0 * log 0 of tokens cut before.
    entropy = -(log_probs * log_probs.exp()).nansum(dim=-1, keepdim=True)
    distance, order = torch.sort(((-log_probs) - entropy).abs(), descending=False)
    mass = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (mass < values).sum(dim=1, keepdim=True).clamp(max=distance.shape[-1] - 1)
    cut = distance > distance.gather(1, last)
    cut[..., :keep] = False
    return logits.masked_fill(cut.scatter(1, order, cut), -math.inf)


def epsilon(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """Cut the tokens below an absolute probability. `values` (n, 1): that probability.

    Hewitt et al. 2022, https://arxiv.org/abs/2210.15191.
    """
    return _cut_improbable(logits, logits.softmax(dim=-1), values, keep)


def eta(logits: Tensor, values: Tensor, keep: int) -> Tensor:
    """Cut the tokens below min(ε, √ε · exp(-entropy)). `values` (n, 1): ε.

    Hewitt et al. 2022, https://arxiv.org/abs/2210.15191.
    """
    log_probs = logits - logits.logsumexp(dim=-1, keepdim=True)
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    entropy = -(finite * log_probs.softmax(dim=-1)).sum(dim=-1, keepdim=True)
    threshold = torch.minimum(values, values.sqrt() * torch.exp(-entropy))
    return _cut_improbable(logits, logits.softmax(dim=-1), threshold, keep)


def _cut_improbable(logits: Tensor, probs: Tensor, threshold: Tensor, keep: int) -> Tensor:
    """Cut where probs < threshold, sparing the `keep` highest logits and their ties."""
    if keep == 1:
        spared = logits.amax(dim=-1, keepdim=True)
    else:
        spared = torch.topk(logits, keep, dim=-1).values[..., -1:]
    return logits.masked_fill((probs < threshold) & (logits < spared), -math.inf)


_PROCESSORS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical": typical,
    "epsilon": epsilon,
    "eta": eta,
}
PROCESSORS: tuple[str, ...] = tuple(_PROCESSORS)
"""The names a step may carry."""

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda v: 0 <= v <= _FP32_MAX, "a finite number of 0 or more"),
    "top_k": (lambda v: v >= 1 and v == math.floor(v), "a whole number of at least 1"),
    "top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "min_p": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "typical": (lambda v: 0 < v < 1, "in (0, 1)"),
    "epsilon": (lambda v: 0 < v < 1, "in (0, 1)"),
    "eta": (lambda v: 0 < v < 1, "in (0, 1)"),
}


def check_step(name: Any, value: Any, keep: Any) -> Step:
    """The step, its value a plain number. Raises ValueError that says what is wrong and what it may be."""
    try:
        return _check_step(name, value, keep)
    except TypeError as error:  # not hashable
        raise ValueError(f"({name!r}, {value!r}, {keep!r}) is not a name and two numbers") from error


@lru_cache(maxsize=4096, typed=True)  # A server checks the same few hundred steps again for every token.
def _check_step(name: Any, value: Any, keep: Any) -> Step:
    if not isinstance(name, str) or name not in _RANGES:
        raise ValueError(f"unknown processor {name!r}: expected one of {', '.join(PROCESSORS)}")
    inside, wanted = _RANGES[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) < math.inf or not inside(value):
        raise ValueError(f"{name} is {value!r}: it must be {wanted}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"min_tokens_to_keep of {name} is {keep!r}: it must be a whole number of at least 1")
    return name, (int(value) if name == "top_k" else float(value)), keep


def warp(logits: Tensor, steps: Sequence[Step]) -> Tensor:
    """Apply the same ordered steps to every row.

    logits: fp32, (rows, vocab), left as it is. Returns a new fp32 tensor of that shape, without waiting for
    the device. Raises ValueError for another dtype or shape, or a step out of range.
    """
    _check_logits(logits)
    checked = [check_step(*step) for step in steps]
    return _run(logits, [checked]) if checked else logits.clone()


def warp_rows(logits: Tensor, rows: Sequence[Sequence[Step]]) -> Tensor:
    """Apply to each row its own ordered steps: row i of the result is `warp(logits[i:i+1], rows[i])`.

    Rows with the same processors in the same order (and the same min_tokens_to_keep) run as one batch,
    whatever their values. Raises as `warp` does, and ValueError when `rows` has another length than logits.
    """
    _check_logits(logits)
    if len(rows) != logits.shape[0]:
        raise ValueError(f"{len(rows)} lists of steps for {logits.shape[0]} rows of logits")
    groups: dict[tuple[Any, ...], list[int]] = {}
    checked = [[check_step(*step) for step in steps] for steps in rows]
    for index, steps in enumerate(checked):
        groups.setdefault(tuple((name, keep) for name, _, keep in steps), []).append(index)
    if len(groups) == 1 and checked[0]:
        return _run(logits, checked)
    out = logits.clone()
    for key, members in groups.items():
        if key:
            index_column = _to_device(torch.tensor(members), logits.device)
            part = _run(logits.index_select(0, index_column), [checked[i] for i in members])
            out.index_copy_(0, index_column, part)
    return out


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32:
        found = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise ValueError(f"logits must be torch.float32 of shape (rows, vocab), not {found}")


def _run(logits: Tensor, rows: Sequence[Sequence[Step]]) -> Tensor:
    """Run the processors that all rows share; `rows` has checked steps for each row, or one for all."""
    vocab = logits.shape[-1]
    if logits.numel() == 0:
        return logits.clone()
    table = torch.tensor([[_parameter(step, vocab) for step in steps] for steps in rows], dtype=torch.float32)
    columns = _to_device(table, logits.device).split(1, dim=1)
    for position, (name, _, keep) in enumerate(rows[0]):
        process, count = _PROCESSORS[name], min(keep, vocab)
        values = [steps[position][1] for steps in rows]
        if name == "temperature" and min(values) < _OVERFLOW_TEMPERATURE:
            process = _tiny_temperature
        elif name == "top_k":
            count = max((int(k) for k in (max(v, keep) for v in values) if k < vocab), default=0)
        logits = process(logits, columns[position], count)
    return logits


def _parameter(step: Step, vocab: int) -> float:
    """The number a processor compares with: computed in double, rounded to fp32, as transformers does."""
    name, value, keep = step
    if name == "top_k":
        k = max(value, keep)
        return float(k) if k < vocab else math.inf
    if name == "temperature" and value == 0:
        return -1.0  # greedy; the tiniest temperatures round to 0 and are not
    return 1 - value if name == "top_p" else value


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device: through pinned memory, as a pageable copy waits for the GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
