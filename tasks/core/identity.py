"""Identities: short content digests, equal on every machine and in every run."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text per value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(*parts: Any, size: int = 16) -> str:
    """Hex BLAKE2b of the canonical JSON of `parts`; `size` bytes (128 bits by default)."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=size).hexdigest()


def prompt_id(source: str, row: dict[str, Any]) -> str:
    """Identity of a prompt: its source's name and its row, whatever the file's order."""
    return digest("prompt", source, row)


class CellIds:
    """The identities of a grid's cells under one model and generation config.

    `candidate_id` is digest("candidate", prompt, heuristic, seed, model, revision, generation): one cell's identity.
    `request_seed` is the first 62 bits of digest("seed", run_seed, prompt, heuristic, seed), in [0, 2**62): the
    sampling seed of one request, never shared between requests (to a hash collision), and the same however prompts are
    sharded or servers counted. The texts to digest are put together by hand, at a fraction of the cost.
    """

    def __init__(self, run_seed: int, model: str, revision: str | None, generation: dict[str, Any]) -> None:
        self._seed_head = f'["seed",{canonical(run_seed)},'
        self._tail = "," + canonical([model, revision, generation])[1:]

    def __call__(self, prompt: str, heuristic: str, seed: int) -> tuple[str, int]:
        """(candidate_id, request_seed) of a cell; the ids must be hex, as digests are."""
        cell = f'"{prompt}","{heuristic}",{seed}'
        name = hashlib.blake2b(f'["candidate",{cell}{self._tail}'.encode(), digest_size=16).hexdigest()
        drawn = hashlib.blake2b(f"{self._seed_head}{cell}]".encode(), digest_size=8).digest()
        return name, int.from_bytes(drawn, "big") >> 2
