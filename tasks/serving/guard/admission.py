"""May a server that comes up late, comes back or joins work for a run? Asked while the run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.core.config import RunConfig, ServerConfig
from tasks.core.heuristics import Heuristic
from tasks.serving import compile as compiling
from tasks.serving.client import ServerFacts
from tasks.serving.guard.asked import asked_of
from tasks.serving.guard.guard import Difference, changed, differences
from tasks.serving.guard.same_model import same_model
from tasks.serving.launch.launch_spec import classifies, specs_of

Recorded = Mapping[str, Sequence[Mapping[str, Any]]]
"""Role -> its servers, as `run.json` has them."""


def refusal(config: RunConfig, heuristics: Iterable[Heuristic], recorded: Recorded, facts: ServerFacts,
            roles: Sequence[str]) -> str | None:
    """Why a server that answers can't work for all of the roles, or None.

    It must be what its own entry of the config asks for. One without an entry joined, and must run as those that are
    known of its role, or as the role's first entry asks while none is. `allow_mismatch` lets it in nevertheless, but
    for what would be sampled another way without a word.
    """
    heuristics = list(heuristics)
    wanted = {classifies(config, role) for role in roles}
    if not facts.generates and False in wanted:
        return "it serves an embedding or reward model, which does not generate"
    if facts.generates and True in wanted:
        return "it serves a model that generates, and quality.method pointwise asks a reward model"
    if "generator" in roles and (why := compiling.unfit(facts, heuristics)):
        return why
    if "judge" in roles and (why := cramped(config, facts)):
        return why
    for role in roles if not config.allow_mismatch else ():
        if found := departures(config, heuristics, recorded, facts, role):
            return _words(found, role)
    return None


def cramped(config: RunConfig, facts: ServerFacts) -> str | None:
    """Why a judge's prompts do not fit into a server's context, or None."""
    if "quality" not in config.labels or facts.context is None:
        return None
    if (most := facts.context - 1) >= config.quality.max_prompt_tokens:  # the verdict takes one
        return None
    return (f"it takes {facts.context} tokens, and a judge's prompt may be {config.quality.max_prompt_tokens} long: "
            f"set quality.max_prompt_tokens to {most} or less (longer texts then lose their middle), or serve it with "
            "a longer context")


def departures(config: RunConfig, heuristics: list[Heuristic], recorded: Recorded, facts: ServerFacts, role: str
               ) -> list[Difference]:
    """In what a server is not what a role needs of it."""
    entries: list[ServerConfig] = getattr(config.servers, role)
    if not entries:  # the generators judge, and they are what the generators must be; but for the model
        known = [s["model_path"] for s in _accepted(recorded, role)]
        wanted = config.judge_model.path
        fits = any(same_model(model, facts.model_path, facts.url)[0] for model in (wanted, *known))
        return [] if fits else [Difference("model", wanted, facts.model_path)]
    own = next((entries[s["entry"]] for s in recorded[role] if s["url"] == facts.url and s.get("entry") is not None),
               next((e for e in entries if e.url and e.url.rstrip("/") == facts.url), None))
    if own is not None:
        spec = next(iter(specs_of(config, role, own)), None)  # whichever GPU it is on
        return differences(asked_of(config, role, own, heuristics), facts, spec)
    asked = asked_of(config, role, entries[0], heuristics)
    others = [changed(_facts(s), facts, asked) for s in _accepted(recorded, role)]
    return min(others, key=len) if others else differences(asked, facts)


def _accepted(recorded: Recorded, role: str) -> list[Mapping[str, Any]]:
    """The role's servers of the config that have answered; one that joined vouches for none, not even itself."""
    return [s for s in recorded[role] if s.get("model_path") and s.get("how") != "joined"]


def _facts(recorded: Mapping[str, Any]) -> ServerFacts:
    return ServerFacts(recorded["url"], recorded["model_path"], recorded.get("honours_seeds", False),
                       recorded.get("custom_processors", False), recorded.get("info", {}))


def _words(found: list[Difference], role: str) -> str:
    model = [d for d in found if d.field == "model"]
    if model:
        return f"it serves {model[0].found}, the {role}'s model is {model[0].asked}"
    return "it is not what is asked for: " + "; ".join(
        f"{d}{f' (start it {d.start})' if d.start else ''}" for d in found)
