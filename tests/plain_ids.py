"""The identities of cells by their definition, one at a time: what the fast ones are compared with."""

from __future__ import annotations

from typing import Any

from tasks.core.identity import digest


def candidate_id(
    prompt: str, heuristic: str, seed: int, model: str, revision: str | None, generation: dict[str, Any]
) -> str:
    """Identity of one cell of the grid, under one model and generation config."""
    return digest("candidate", prompt, heuristic, seed, model, revision, generation)


def request_seed(run_seed: int, prompt: str, heuristic: str, seed: int) -> int:
    """The sampling seed of one request, in [0, 2**62): never shared between requests (to a hash
    collision), and the same however prompts are sharded or servers counted."""
    return int(digest("seed", run_seed, prompt, heuristic, seed, size=8), 16) >> 2
