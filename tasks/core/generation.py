"""What a role's requests ask for, each value with its layer and origin, and what that makes of a heuristic.

Precedence for each field: `--set`, the heuristic, the role's config, the model's generation_config.json, the default.
Everything is then sent explicitly, so that nothing of a server's own preferences can slip under a request.

A heuristic says what truncates: one that names processors is complete towards the model's file, whose recommendation
would else be a second, hidden cut on every heuristic. What the user writes (`--set`, the role's config) does reach it.
The file's temperature and cuts go to heuristics that name no processors, to a family's `official`, and with
`heuristics.fill_from_model` to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tasks.core.config_generation import GenerationConfig
from tasks.core.errors import InputError
from tasks.core.heuristics import Heuristic, Processor
from tasks.core.model_defaults import ModelDefaults

Layer = Literal["set", "config", "model", "method", "default"]
"""set: the command line; config: the YAML file; model: generation_config.json; method: what reading a verdict needs;
default: the engine's neutral value."""

_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "repetition_penalty": 1.0, "max_new_tokens": 250, "min_new_tokens": 0, "stop": [], "stop_token_ids": [],
    "ignore_eos": False,
}
# A verdict is read from the model's own probabilities of the two verdict tokens at the first place: nothing that a
# file recommends for writing may bend them.
_VERDICT: dict[str, Any] = _DEFAULTS | {"max_new_tokens": 1, "ignore_eos": True}
FIELDS = (*_DEFAULTS, "seed")
CUTS: dict[str, float] = {"top_k": -1, "top_p": 1.0, "min_p": 0.0}
"""Native cuts in Hugging Face's order, each with the value that cuts nothing."""
_IN_HEURISTIC = ("temperature", *CUTS)


@dataclass(frozen=True)
class Value:
    """A value, the layer that it is from, and where exactly, for people."""

    value: Any
    layer: Layer
    origin: str


class RoleGeneration(Mapping[str, Any]):
    """Every field of one role's requests, none unset: `generation["max_new_tokens"]`."""

    def __init__(self, values: dict[str, Value]) -> None:
        self.values_from = values

    def __getitem__(self, name: str) -> Any:
        return self.values_from[name].value

    def __iter__(self) -> Any:
        return iter(self.values_from)

    def __len__(self) -> int:
        return len(self.values_from)

    def identity(self) -> dict[str, Any]:
        """The values that decide which tokens are asked for, whatever the heuristic: part of every candidate's id.

        Temperature and cuts are not among them: they are in the heuristic's id, as executed.
        """
        return {name: value for name, value in self.items() if name not in _IN_HEURISTIC}

    def recorded(self) -> dict[str, Any]:
        """As `run.json` has it."""
        return {name: {"value": v.value, "layer": v.layer, "from": v.origin} for name, v in self.values_from.items()}

    @classmethod
    def from_recorded(cls, raw: dict[str, Any]) -> RoleGeneration:
        """The same again."""
        return cls({name: Value(v["value"], v["layer"], v["from"]) for name, v in raw.items()})


def resolve_role(role: str, given: GenerationConfig, origins: Mapping[str, str], model: ModelDefaults | None,
                 run_seed: int = 0) -> RoleGeneration:
    """A role's fields by precedence. Raises InputError where values of different origin can't stand together."""
    judges = role == "judge"
    fallback = _VERDICT if judges else _DEFAULTS
    out: dict[str, Value] = {}
    for name in _DEFAULTS:
        value = getattr(given, name)
        if value is not None:
            origin = origins.get(f"generation.{role}.{name}", "config")
            out[name] = Value(value, "set" if origin.startswith("--") else "config", origin)
        elif not judges and model is not None and name in model.fields:
            out[name] = Value(model.fields[name], "model", model.source)
        elif judges:
            out[name] = Value(fallback[name], "method", "a verdict is read from the judge's own probabilities")
        else:
            out[name] = Value(fallback[name], "default", "default")
    origin = origins.get(f"generation.{role}.seed", "config")
    if given.seed is not None:
        out["seed"] = Value(given.seed, "set" if origin.startswith("--") else "config", origin)
    else:
        out["seed"] = Value(0 if judges else run_seed, "default", "default" if judges else "run_seed")
    least, most = out["min_new_tokens"], out["max_new_tokens"]
    if least.value > most.value:
        raise InputError(f"generation.{role}: min_new_tokens is {least.value} ({least.origin}), max_new_tokens is "
                         f"{most.value} ({most.origin}); set generation.{role}.max_new_tokens to {least.value} or more")
    return RoleGeneration(out)


def complete(heuristic: Heuristic, generation: RoleGeneration, model: ModelDefaults | None, fill_from_model: bool
             ) -> Heuristic:
    """The heuristic as it is executed: its own processors, and what the layers above and below it say.

    Its temperature comes first and a cut that it lacks last, in Hugging Face's order. With a temperature of 0 nothing
    else matters: it is then the only processor. A cut that cuts nothing (top_p 1) is left out: it would be the same
    request under another id.
    """
    steps = list(heuristic.processors)
    named = {p.name for p in steps}
    takes_model = fill_from_model or not heuristic.processors
    for name in _IN_HEURISTIC:
        found = generation.values_from[name]
        if found.layer == "set":
            steps = _override(steps, name, found.value)
        elif name not in named and (found.layer == "config" or (found.layer == "model" and takes_model)):
            steps = _insert(steps, name, found.value)
    if takes_model and model is not None:
        steps += [Processor(name, value) for name, value in model.processors
                  if name not in (*_IN_HEURISTIC, *(p.name for p in steps))]
    greedy = [p for p in steps if p.name == "temperature" and p.value == 0]
    cutting = [p for p in steps if p.name == "temperature" or not _neutral(p.name, p.value)]
    return Heuristic(heuristic.name, tuple(greedy[:1] or cutting), heuristic.aliases)


def _neutral(name: str, value: float) -> bool:
    return value == CUTS.get(name, 1.0)


def _override(steps: list[Processor], name: str, value: float) -> list[Processor]:
    first = next((n for n, p in enumerate(steps) if p.name == name), None)
    if first is None:
        return _insert(steps, name, value)
    rest = [p for p in steps if p.name != name]
    if name != "temperature" and _neutral(name, value):
        return rest
    at = sum(p.name != name for p in steps[:first])
    return [*rest[:at], Processor(name, value, steps[first].min_tokens_to_keep), *rest[at:]]


def _insert(steps: list[Processor], name: str, value: float) -> list[Processor]:
    if _neutral(name, value):
        return steps
    return [Processor(name, value), *steps] if name == "temperature" else [*steps, Processor(name, value)]
