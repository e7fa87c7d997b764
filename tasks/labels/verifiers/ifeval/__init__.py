"""IFEval: does a text follow the verifiable instructions of its prompt?

Zhou et al., "Instruction-Following Evaluation for Large Language Models" (arXiv:2311.07911), the 25
instruction kinds of the benchmark. The score is the strict verdict on the whole prompt: 1.0 when every
instruction is followed. The loose verdict also lets an instruction pass on a variant of the text without
its first line, its last line, both, or its asterisks.

The ground truth is JSON: `{"instruction_id_list": ["punctuation:no_comma", ...], "kwargs": [{}, ...]}`.
"""

from __future__ import annotations

import json
from functools import lru_cache

from tasks.labels.verifiers.base import Verdict
from tasks.labels.verifiers.ifeval.instructions import Instruction, bind

_KEYS = {"instruction_id_list", "kwargs"}


def check(ground_truth: str) -> str | None:
    """None when the ground truth names known instructions with fitting arguments; else what is wrong."""
    try:
        _instructions(ground_truth)
    except ValueError as error:
        return str(error)
    return None


@lru_cache(maxsize=1024)
def prepare(ground_truth: str) -> None:
    """Load what the instructions need (language profiles, tokenizers), by checking a trifle.

    Raises ValueError when the ground truth is malformed.
    """
    for instruction in _instructions(ground_truth):
        instruction.followed_by("A trifle.")


def verify(text: str, ground_truth: str) -> Verdict:
    """Check every instruction, strictly and loosely.

    Raises ValueError when the ground truth is malformed.
    """
    instructions = _instructions(ground_truth)
    if not text.strip():
        return Verdict(0.0, None, "no_answer", 0.0)
    strict = [instruction.followed_by(text) for instruction in instructions]
    variants = loose_variants(text)
    loose = all(
        followed or any(instruction.followed_by(variant) for variant in variants)
        for instruction, followed in zip(instructions, strict, strict=True)
    )
    missed = [instruction.id for instruction, followed in zip(instructions, strict, strict=True) if not followed]
    reason = f"not followed: {', '.join(missed)}" if missed else None
    return Verdict(float(not missed), None, reason, float(loose))


def loose_variants(text: str) -> list[str]:
    """The texts of the loose rule besides the text itself, without repetitions and blank ones."""
    lines = text.split("\n")
    trimmed = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys(trimmed + [variant.replace("*", "") for variant in trimmed])
    return [variant for variant in variants if variant.strip() and variant != text]


@lru_cache(maxsize=1024)
def _instructions(ground_truth: str) -> tuple[Instruction, ...]:
    try:
        parsed = json.loads(ground_truth)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(parsed, dict) or not parsed.keys() >= _KEYS:
        raise ValueError("not an object with 'instruction_id_list' and 'kwargs'")
    ids, arguments = parsed["instruction_id_list"], parsed["kwargs"]
    if not isinstance(ids, list) or not ids:
        raise ValueError("'instruction_id_list' is not a list of at least one id")
    if not isinstance(arguments, list) or len(arguments) != len(ids):
        raise ValueError(f"'kwargs' is not a list as long as 'instruction_id_list' ({len(ids)})")
    return tuple(bind(name, given) for name, given in zip(ids, arguments, strict=True))
