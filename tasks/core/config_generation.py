"""How a role's server is asked to generate: one `GenerationConfig` each for the generator and the judge."""

from __future__ import annotations

import copy
import datetime
import warnings
from typing import Any

from pydantic import Field, model_validator

from tasks.core.chat_template import DEFAULT_DATE
from tasks.core.section import Flags, Section

ROLES = ("generator", "judge")


class GenerationConfig(Section):
    """What one role's requests ask for. A key that is not given is not a default: it comes from the model's
    generation_config.json or, last, from the engine (`winnow config` shows each value and its origin)."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    """Divides the logits; 0 takes the likeliest token. A heuristic that names a temperature keeps its own."""
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """Tokens kept; -1 keeps all. A heuristic that names a top_k keeps its own; likewise top_p and min_p."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Probability mass kept; 1 keeps all."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Least probability kept, as a share of the likeliest token's; 0 keeps all."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from a token's logit for each time it was written."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    """Subtracted from the logit of every token that was written."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    """Divides the positive logits of tokens that were written or prompted, and multiplies the negative ones."""
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """Seeds the role's sampling; the generator's is run_seed and the judge's 0 where not given."""
    max_new_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """Longest answer in tokens."""
    min_new_tokens: int | None = Field(default=None, ge=0)
    """Shortest answer in tokens."""
    stop: list[str] | None = None
    """Texts that end an answer."""
    stop_token_ids: list[int] | None = None
    """Token ids that end an answer, beside the model's own end."""
    ignore_eos: bool | None = None
    """Write on after the model's end-of-sequence token."""
    context_length: int | None = Field(default=None, ge=16)
    """Longest sequence (prompt and answer) in tokens that the role's servers shall take; the model's own where not
    given."""
    chat_template: str | None = None
    """A Jinja chat template, or a file with one, in place of the tokenizer's."""
    template_date: datetime.date = DEFAULT_DATE
    """The day that a chat template is told when it stamps one: always this, so that a prompt is the same tomorrow."""
    system_prompt: str | None = None
    """System message in front of every prompt that brings none (the judge: in place of its template's)."""
    engine: Flags = {}
    """SGLang flags of the role's servers, as in launch.flags, which comes first: {kv-cache-dtype: fp8_e5m2}."""

    @model_validator(mode="after")
    def _possible(self) -> GenerationConfig:
        if self.top_k == 0:
            raise ValueError("top_k: 0 keeps nothing; -1 keeps all")
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_new_tokens ({least}) is above max_new_tokens ({most})")
        if any(not 0 <= token < 2**31 for token in self.stop_token_ids or ()):
            raise ValueError("stop_token_ids: a token id is 0 or more (and below 2**31)")
        if "" in (self.stop or ()):
            raise ValueError("stop: an empty text would end every answer at once")
        return self


class GeneratorConfig(GenerationConfig):
    """How candidates are written, where the heuristic does not say."""

    sampling_mask: bool = False
    """Record the token ids that the engine kept at each step, and the exact log-probability of the sampled one, where
    it can: native top_k."""


# A role-less key and the roles that it stands for. A judge's answer is one token after a prompt of its own template:
# how long candidates are, what ends and what precedes them is not for it.
_BOTH = ("temperature", "top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
         "seed", "context_length", "chat_template", "template_date", "engine")
_WRITER = ("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "system_prompt", "sampling_mask")
ALIASES: dict[str, tuple[str, ...]] = {
    **{key: ROLES for key in _BOTH}, **{key: ("generator",) for key in _WRITER}}


class RoleLessKey(DeprecationWarning):
    """A key of `generation` without a role."""


def warn_role_less(key: str, where: str) -> None:
    """Say that a key should name its role."""
    own = " and ".join(f"generation.{role}.{key}" for role in ALIASES[key])
    warnings.warn(f"{where}: generation.{key} is deprecated; write {own}", RoleLessKey, stacklevel=3)


def fan_out(raw: dict[str, Any]) -> list[str]:
    """Replace the role-less keys of a raw `generation` by those of the roles that lack them, in place; the keys."""
    found = [key for key in raw if key in ALIASES]
    for key in found:
        value = raw.pop(key)
        for role in ALIASES[key]:
            given = raw.setdefault(role, {})
            if isinstance(given, dict):  # else the role's own type says what is wrong
                given.setdefault(key, copy.deepcopy(value))  # what --set changes for one role is that role's alone
    return found


class Generation(Section):
    """How each role's servers are asked to generate. Keys without a role (generation.temperature) are deprecated: they
    stand for the roles that have a use for them, and a role's own key wins."""

    generator: GeneratorConfig = GeneratorConfig()
    """Who writes the candidates."""
    judge: GenerationConfig = GenerationConfig()
    """Who compares them."""

    @model_validator(mode="before")
    @classmethod
    def _role_less(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(key in ALIASES for key in value):
            value = {k: dict(v) if isinstance(v, dict) else v for k, v in value.items()}
            for key in fan_out(value):
                warn_role_less(key, "config")
        return value

    def role(self, name: str) -> GenerationConfig:
        """A role's config."""
        return self.generator if name == "generator" else self.judge
