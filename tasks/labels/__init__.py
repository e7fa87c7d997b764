"""Labellers, found by name. Each reads a verified shard and writes a table keyed by candidate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.labels.base import Labeller


def labellers(names: Iterable[str]) -> list[Labeller]:
    """The labellers of a config, in their canonical order; imported only when asked for."""
    from tasks.labels.diversity_labeller import DiversityLabeller
    from tasks.labels.quality.labeller import QualityLabeller
    from tasks.labels.verifiers.labeller import VerifierLabeller

    known: dict[str, type[Labeller]] = {
        "quality": QualityLabeller, "diversity": DiversityLabeller, "verifiers": VerifierLabeller}
    wanted = set(names)
    return [make() for name, make in known.items() if name in wanted]
