"""The custom logit processor that SGLang runs: one constant class, its parameters in every request.

A request for a heuristic that the engine lacks carries `custom_logit_processor = processor_string()` and
`sampling_params["custom_params"] = encode_steps(steps)`. SGLang calls the processor once a step for all requests
whose strings are equal, on the logits before its own temperature, so such a request sends temperature 1.

The string is SGLang's `{"callable": <hex of a pickle>}`. The pickle evaluates one constant expression, built from
the source text of `tasks.core.warpers` and of the definitions between `decode_steps` and `TruncationProcessor`
below, without what only people read. Unlike bytecode, or what a compressor makes of it, it is the same in every
process, Python version and build, and the server needs only torch.
"""

# No `from __future__ import annotations`: the definitions below run on the server as text.
import inspect
import io
import json
import pickle
import tokenize
from collections.abc import Sequence
from functools import cache
from typing import Any

from tasks.core import warpers
from tasks.core.warpers import Step, check_step, warp_rows


def decode_steps(params: Any) -> list[Step]:
    """The steps in the `custom_params` of a request. Raises ValueError that says what is wrong with them."""
    if not isinstance(params, dict) or "winnow" not in params:
        raise ValueError("custom_params has no 'winnow' list of processors")
    flat = params["winnow"]
    if not isinstance(flat, (list, tuple)) or len(flat) % 3 or len(flat) > 96:
        raise ValueError("'winnow' must list name, value, min_tokens_to_keep for each of at most 32 processors")
    return [check_step(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def refuse(params: Any, reason: str) -> None:
    """End the request behind `params` as SGLang ends a failed one: HTTP 400 with the reason. Never raises."""
    import logging

    logger = logging.getLogger("winnow.logit_processor")
    try:
        request = params["__req__"]
        from sglang.srt.managers.schedule_batch import FINISH_ABORT  # pyright: ignore[reportMissingImports]

        # Not set_finish_with_abort: that one is for requests that do not run yet, and replaces their prompt.
        if request.to_finish is None and request.finished_reason is None:
            request.to_finish = FINISH_ABORT(f"winnow: {reason}", 400, "BadRequestError")
            logger.error("request %s aborted: %s", getattr(request, "rid", None), reason)
    except Exception as error:
        logger.error("a request that cannot be sampled as asked (%s) could not be aborted: %r", reason, error)


class TruncationProcessor:
    """Applies every row's own steps. An exception here would end the whole server, so none leaves `__call__`.

    A row that cannot be processed has its request aborted with the reason; its logits stay as they were, and the
    other rows are processed all the same.
    """

    def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
        """logits: (rows, vocab) of any float dtype; one dict of parameters a row. Returns the same shape, dtype."""
        try:
            return self._process(logits, custom_param_list)
        except Exception as error:
            self._refuse_all(custom_param_list, f"the logit processor failed: {error!r:.300}")
            return logits

    def _process(self, logits: Any, params: Any) -> Any:
        if not isinstance(params, (list, tuple)) or logits.dim() != 2 or len(params) != logits.shape[0]:
            count = len(params) if isinstance(params, (list, tuple)) else None
            self._refuse_all(params, f"{count} lists of parameters for logits of shape {tuple(logits.shape)}")
            return logits
        # With speculation one request has several rows, each with the same dict.
        rows: list[list[Step]] = []
        for param in params:
            try:
                rows.append(decode_steps(param))
            except Exception as error:
                rows.append([])
                refuse(param, str(error)[:500])
        try:
            return warp_rows(logits.float(), rows).to(logits.dtype)
        except Exception:
            return self._one_by_one(logits, rows, params)

    def _one_by_one(self, logits: Any, rows: Any, params: Any) -> Any:
        """After a failure of the batch (out of memory, say): what can be processed is, the rest is refused."""
        out = logits.clone()
        for index, steps in enumerate(rows):
            try:
                out[index : index + 1] = warp_rows(logits[index : index + 1].float(), [steps]).to(logits.dtype)
            except Exception as error:
                refuse(params[index], f"the logit processor failed: {error!r:.300}")
        return out

    def _refuse_all(self, params: Any, reason: str) -> None:
        for param in params if isinstance(params, (list, tuple)) else ():
            refuse(param, reason)


def encode_steps(steps: Sequence[Step]) -> dict[str, list[str | float | int]]:
    """The `custom_params` of a request: a flat list, as SGLang carries no nested ones. Raises ValueError."""
    params = {"winnow": [part for step in steps for part in check_step(*step)]}
    decode_steps(params)
    return params


@cache
def processor_string() -> str:
    """The value of `custom_logit_processor`, the same wherever it is built."""
    parts = (warpers, decode_steps, refuse, TruncationProcessor)
    source = compact("\n\n".join(inspect.getsource(part) for part in parts))
    expression = (
        "(lambda names: (exec(" + ascii(source) + ", names), names['TruncationProcessor'])[1])"
        "({'__name__': 'winnow_logit_processor'})"
    )
    # Protocol 2 writes the same bytes since Python 3.0.
    return json.dumps({"callable": pickle.dumps(_Evaluated(expression), protocol=2).hex()})


def compact(source: str) -> str:
    """The same program in fewer characters: no comments, no docstrings, no space that nothing needs.

    Made of the tokens alone, of which an f-string counts as one (several since Python 3.12), so that every version
    makes the same of it. No block may consist of its docstring.
    """
    lines = source.splitlines(keepends=True)
    out: list[str] = []
    statement: list[str] = []
    depth = opened = 0
    start, only_text = (1, 0), True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        depth += (kind == "INDENT") - (kind == "DEDENT")
        if kind == "NEWLINE":
            if not only_text:
                out.append(" " * depth + "".join(statement))
            statement, only_text = [], True
        if kind in ("NEWLINE", "NL", "COMMENT", "INDENT", "DEDENT", "ENDMARKER"):
            continue
        if not opened:
            start = token.start
        opened += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if not opened:
            part = _between(lines, start, token.end)
            statement += [" ", part] if statement and _touch(statement[-1], part) else [part]
            only_text = only_text and kind == "STRING"
    return "\n".join([*out, ""])


def _touch(left: str, right: str) -> bool:
    """Whether two tokens need a space between them: names, numbers and strings do."""
    return all(c.isalnum() or c in "_'\"" for c in (left[-1], right[0]))


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from `start` to `end`: (line from 1, column)."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    middle = lines[start[0] : end[0] - 1]
    return "".join([lines[start[0] - 1][start[1] :], *middle, lines[end[0] - 1][: end[1]]])


class _Evaluated:
    """Pickles to the value of an expression."""

    def __init__(self, expression: str) -> None:
        self._expression = expression

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (self._expression,)
