"""Sampling heuristics: ordered processors with parameters, grids per model family, identities.

A heuristic is what a candidate was sampled with. Its identity is the digest of its ordered
processors and their parameters, never its name, so that two names for one thing are one heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.config_file import parse_value
from tasks.core.errors import InputError, did_you_mean
from tasks.core.identity import digest

# processor -> (its parameter's name, test, the range in words)
_PARAMETERS: dict[str, tuple[str, Any, str]] = {
    "temperature": ("temperature", lambda v: 0 <= v <= 100, "between 0 (the likeliest token) and 100"),
    "top_k": ("top_k", lambda v: 1 <= v < 2**31 and v == int(v), "a whole number of 1 or more (and below 2**31)"),
    "top_p": ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": ("min_p", lambda v: 0 <= v <= 1, "between 0 and 1"),
    "typical": ("mass", lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
    "epsilon": ("epsilon", lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
    "eta": ("epsilon", lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
}
PROCESSORS = tuple(_PARAMETERS)

# The grid of Adaptive-Sampling-Networks: 12 temperatures x {bare, official, 31 truncations}.
TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.7, 2.1, 2.5)
_GRID: dict[str, tuple[float, ...]] = {
    "top_p": (0.5, 0.8, 0.9, 0.95, 0.98),
    "top_k": (8, 16, 32, 64, 128),
    "min_p": (0.01, 0.02, 0.05, 0.1),
    "eta": (1e-3, 8e-4, 5e-4, 2e-4, 1e-4),
    "epsilon": (4e-3, 2e-3, 1e-3, 8e-4, 5e-4, 2e-4),
    "typical": (0.2, 0.5, 0.8, 0.9, 0.92, 0.95),
}
# What each family's makers recommend beside the temperature, in the order Hugging Face applies it
# (temperature, top_k, top_p); the numbers of the model's own generation_config.json come first.
_OFFICIAL: dict[str, tuple[tuple[str, float], ...]] = {
    "llama": (("top_p", 0.9),),
    "qwen": (("top_k", 20), ("top_p", 0.8)),
    "gemma": (("top_k", 64), ("top_p", 0.95)),
    "generic": (),
}
FAMILIES = tuple(_OFFICIAL)


@dataclass(frozen=True)
class Processor:
    """One logit processor and its parameter."""

    name: str
    value: float
    min_tokens_to_keep: int = 1

    @property
    def params(self) -> dict[str, float]:
        """The parameters by name, as in a config file."""
        out: dict[str, float] = {_PARAMETERS[self.name][0]: self.value}
        return out | ({"min_tokens_to_keep": self.min_tokens_to_keep} if self.min_tokens_to_keep > 1 else {})


@dataclass(frozen=True)
class Heuristic:
    """An ordered sequence of processors under a name; equal sequences have equal ids."""

    name: str
    processors: tuple[Processor, ...]
    aliases: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Digest of the ordered processors with their parameters."""
        return digest("heuristic", [[p.name, p.params] for p in self.processors])

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest token, so that nothing is drawn."""
        return any(p.name == "temperature" and p.value == 0 for p in self.processors)

    @property
    def steps(self) -> list[tuple[str, float, int]]:
        """The processors as `tasks.core.warpers` takes them."""
        return [(p.name, p.value, p.min_tokens_to_keep) for p in self.processors]

    def describe(self) -> str:
        """`temperature 0.7 > top_p 0.9`, for people."""
        if self.greedy:
            return "greedy"
        return " > ".join(f"{p.name} {p.value:g}" for p in self.processors) or "the model's own distribution"


def parse_processor(raw: Any, where: str) -> Processor:
    """A checked processor from its YAML form `{name, params: {...}}`; InputError names `where`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise InputError(f"{where}: a processor is written {{name: top_p, params: {{top_p: 0.9}}}}")
    name = raw["name"]
    if name not in _PARAMETERS:
        raise InputError(f"{where}.name: unknown processor '{name}'{did_you_mean(name, list(PROCESSORS))} "
                         f"Known: {', '.join(PROCESSORS)}.")
    for key in raw:
        if key not in ("name", "params"):
            raise InputError(f"{where}: unknown key '{key}'{did_you_mean(str(key), ['name', 'params'])}")
    params = raw.get("params") or {}
    key, in_range, words = _PARAMETERS[name]
    if not isinstance(params, dict):
        raise InputError(f"{where}.params: must be a mapping such as {{{key}: ...}}")
    for given in params:
        if given not in (key, "min_tokens_to_keep"):
            known = [key, "min_tokens_to_keep"]
            raise InputError(f"{where}.params: unknown parameter '{given}' of {name}"
                             f"{did_you_mean(str(given), known)} Known: {', '.join(known)}.")
    if key not in params:
        raise InputError(f"{where}.params: {name} needs '{key}'")
    value, keep = params[key], params.get("min_tokens_to_keep", 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) == math.inf \
            or value != value or not in_range(value):
        raise InputError(f"{where}.params.{key}: {value!r} is out of range, must be {words}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise InputError(f"{where}.params.min_tokens_to_keep: {keep!r}, must be a whole number of 1 or more")
    if keep > 1 and name in ("temperature",):
        raise InputError(f"{where}.params.min_tokens_to_keep: {name} removes no tokens, drop this key")
    return Processor(name, int(value) if name == "top_k" else float(value) + 0.0, keep)  # no -0.0


def family_grid(family: str, recommended: Sequence[tuple[str, float]] = ()) -> list[Heuristic]:
    """The grid of a model family, unfolded: 396 heuristics (384 where none is official).

    `recommended`: the cuts of the model's generation_config.json, (name, value) in order; the family's where empty.
    """
    if family not in _OFFICIAL:
        raise InputError(f"heuristics.family: unknown family '{family}'{did_you_mean(family, list(FAMILIES))} "
                         f"Known: {', '.join(FAMILIES)}.")
    out = []
    for t in TEMPERATURES:
        heat = Processor("temperature", t)
        out.append(Heuristic(f"temperature {t:g}", (heat,)))
        if official := recommended or _OFFICIAL[family]:
            cuts = tuple(Processor(n, v) for n, v in official)
            out.append(Heuristic(f"official, temperature {t:g}", (heat, *cuts)))
        for name, values in _GRID.items():
            out.extend(
                Heuristic(f"{name} {v:g}, temperature {t:g}", (heat, Processor(name, v))) for v in values
            )
    return out


def load_file(path: str | Path) -> Any:
    """What a YAML file of heuristics holds, unchecked."""
    try:
        return parse_value(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"heuristics.files: cannot read {path}: {getattr(error, 'strerror', error)}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error


def read_file(path: str | Path) -> list[Heuristic]:
    """Heuristics of a YAML file `sampling_pipelines: [{name, weight, processors: [...]}]`."""
    return read_pipelines(load_file(path), path)


def read_pipelines(raw: Any, path: str | Path) -> list[Heuristic]:
    """The heuristics that `load_file` found at `path`.

    `weight` is read and checked for the sake of files written for random choice; here every
    heuristic of the file runs for every prompt, and a weight of 0 leaves one out.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("sampling_pipelines"), list):
        raise InputError(f"{path}: needs a list under the key 'sampling_pipelines'")
    for key in raw:
        if key != "sampling_pipelines":
            raise InputError(f"{path}: unknown key '{key}'{did_you_mean(str(key), ['sampling_pipelines'])}")
    out = []
    for n, entry in enumerate(raw["sampling_pipelines"]):
        heuristic = _read_pipeline(entry, f"{path}: sampling_pipelines.{n}")
        if heuristic is not None:
            out.append(heuristic)
    return out


def _read_pipeline(entry: Any, where: str) -> Heuristic | None:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be a mapping with name and processors")
    known = ["name", "weight", "processors"]
    for key in entry:
        if key not in known:
            raise InputError(f"{where}: unknown key '{key}'{did_you_mean(str(key), known)}")
    name, weight, processors = entry.get("name"), entry.get("weight", 1), entry.get("processors")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}.name: every heuristic needs a name")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e9:
        raise InputError(f"{where}.weight: {weight!r}, must be a number of 0 or more")
    if not isinstance(processors, list):
        raise InputError(f"{where}.processors: must be a list (an empty one samples as the generator's config and the "
                         "model's generation_config.json say)")
    parsed = tuple(parse_processor(p, f"{where}.processors.{i}") for i, p in enumerate(processors))
    return Heuristic(name.strip(), parsed) if weight > 0 else None


def fold(heuristics: Iterable[Heuristic]) -> list[Heuristic]:
    """One heuristic per id, in order of first appearance, later names kept as aliases.

    Two different heuristics under one name are an InputError: a reader could not tell them apart.
    """
    by_id: dict[str, Heuristic] = {}
    by_name: dict[str, str] = {}
    for h in heuristics:
        if by_name.setdefault(h.name, h.id) != h.id:
            raise InputError(f"heuristics: two different heuristics are named '{h.name}'; rename one")
        if h.id not in by_id:
            by_id[h.id] = h
        elif h.name != (known := by_id[h.id]).name and h.name not in known.aliases:
            by_id[h.id] = Heuristic(known.name, known.processors, (*known.aliases, h.name))
    return list(by_id.values())


def expand(family: str | None, files: Iterable[str | Path], recommended: Sequence[tuple[str, float]] = ()
           ) -> list[Heuristic]:
    """A family's grid, files, or both; folded and never empty."""
    return fold(unfolded(family, [(path, load_file(path)) for path in files], recommended))


def unfolded(family: str | None, files: Iterable[tuple[str | Path, Any]], recommended: Sequence[tuple[str, float]] = ()
             ) -> list[Heuristic]:
    """A family's grid and the contents of files (path, what `load_file` found), as they were written."""
    found = family_grid(family, recommended) if family else []
    for path, raw in files:
        found += read_pipelines(raw, path)
    if not found:
        raise InputError("heuristics: none; give heuristics.family, heuristics.files or both")
    return found
