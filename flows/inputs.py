"""What the config names but does not hold: heuristics files, templates, the model's generation_config.json.

`run.json` keeps them, so that it alone is enough to run again: what the config still names is then taken from there,
and what was changed since (a `--set`) is read anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.core.chat_template import ChatTemplate, apply, chat_template, system_turns
from tasks.core.config import ModelRef, RunConfig
from tasks.core.errors import InputError
from tasks.core.heuristics import load_file
from tasks.core.model_defaults import ModelDefaults, from_recorded, read_model_defaults
from tasks.core.tokenizer import load_tokenizer
from tasks.labels.quality.pointwise import no_reward_model
from tasks.labels.quality.templates import JudgeTemplate, load_template
from tasks.serving.launch.flags import flag_name

log = logging.getLogger("winnow.prepare")


@dataclass(frozen=True)
class Inputs:
    """The contents behind the config's names."""

    heuristics: list[tuple[str, Any]]
    """(path, what it holds) of each file."""
    model_defaults: ModelDefaults | None
    """The generator's generation_config.json."""
    chat_templates: dict[str, ChatTemplate]
    """By role; the judge's only where it has work."""
    named_judge_template: JudgeTemplate | None
    """The one that quality.template names; None where nothing is compared."""
    judge_system: str | None = None
    """generation.judge.system_prompt, in place of that template's own."""

    @property
    def judge_template(self) -> JudgeTemplate | None:
        """The judge's template in use."""
        named = self.named_judge_template
        return named and named.with_system(self.judge_system)

    def recorded(self, config: RunConfig) -> dict[str, Any]:
        """As `run.json` has it, each with the name that it stands for."""
        template = self.named_judge_template
        return {
            "heuristics": [{"name": path, "content": content} for path, content in self.heuristics],
            "generation_config": {"name": config.model.model_dump(), "content": self.model_defaults.recorded()
                                  if self.model_defaults else None},
            "chat_templates": {role: {"name": _template_name(config, role), "content": found.recorded()}
                               for role, found in self.chat_templates.items()},
            "judge_template": {"name": config.quality.template, "content": template.recorded()} if template else None,
        }


def gather(config: RunConfig, recorded: dict[str, Any] | None = None) -> Inputs:
    """Read what the config names, or take it from `recorded`. Raises InputError, UnreachableError."""
    if recorded is None:
        return _gather(config, {})
    with _as_recorded():
        return _gather(config, recorded)


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    try:
        yield
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"run.json: inputs: not as this version of Winnow records them ({error!r}); use the config "
                         "that the run was begun with") from error


def _gather(config: RunConfig, known: dict[str, Any]) -> Inputs:
    files = {f["name"]: f["content"] for f in known.get("heuristics", [])}
    heuristics = [(path, files[path] if path in files else load_file(path)) for path in config.heuristics.files]
    found = known.get("generation_config")
    if found and found["name"] == config.model.model_dump():
        defaults = from_recorded(found["content"]) if found["content"] else None
    else:
        defaults = read_model_defaults(config.model)
    templates = {"generator": _chat_template(config, "generator", known)}
    judge = None
    if "quality" in config.labels:
        templates["judge"] = _chat_template(config, "judge", known)
        if config.quality.method == "tournament":
            judge = _judge_template(config, known.get("judge_template"))
    return Inputs(heuristics, defaults, templates, judge, config.generation.judge.system_prompt)


def _model(config: RunConfig, role: str) -> tuple[ModelRef, str]:
    """A role's model, and the config's key of it."""
    return config.model_of(role), "quality.model.path" if role == "judge" else "model.path"


def _template_name(config: RunConfig, role: str) -> dict[str, Any]:
    given = config.generation.role(role)
    return {"model": config.model_of(role).model_dump(), "chat_template": given.chat_template,
            "date": given.template_date.isoformat()}


def _chat_template(config: RunConfig, role: str, known: dict[str, Any]) -> ChatTemplate:
    before, given = known.get("chat_templates", {}).get(role), config.generation.role(role)
    if before and before["name"] | {"date": None} == _template_name(config, role) | {"date": None}:
        found = ChatTemplate.from_recorded(before["content"])
        return dataclasses.replace(found, date=given.template_date) if found.stamps_date else found
    tokenizer = load_tokenizer(*_model(config, role), needs_template=given.chat_template is None)
    return chat_template(tokenizer, given.chat_template, given.template_date, f"generation.{role}.chat_template")


def _judge_template(config: RunConfig, before: dict[str, Any] | None) -> JudgeTemplate:
    try:
        if before and before["name"] == config.quality.template:
            return JudgeTemplate.from_recorded(before["content"])
        return load_template(config.quality.template)
    except ValueError as error:
        raise InputError(f"quality.template: {error}") from error


def check_verdicts(config: RunConfig, inputs: Inputs) -> None:
    """Raises InputError where the judge's verdicts are not one token each, or its template leaves no room for texts."""
    if not (template := inputs.judge_template):
        return
    tokenizer, chat = load_tokenizer(*_model(config, "judge"), needs_template=False), inputs.chat_templates["judge"]
    try:
        template.verdict_token_ids(tokenizer, chat)
    except ValueError as error:
        raise InputError(f"quality.template: {error}") from error
    long = "a long text " * 20
    try:
        template.render(tokenizer, long, long, long, max_tokens=config.quality.max_prompt_tokens, chat=chat)
    except ValueError as error:
        raise InputError(f"quality.max_prompt_tokens: {str(error).removeprefix('max_tokens: ')}") from error


def check_reward_model(config: RunConfig, inputs: Inputs) -> None:
    """Raises InputError where a pointwise judge can't be one: nobody to serve it, a model that gives no single score,
    a chat template that makes nothing of an answer."""
    if "judge" not in inputs.chat_templates or config.quality.method != "pointwise":
        return
    if not config.servers.judge:
        raise InputError("quality.method: pointwise asks a reward model, which the generators can't serve; give it its "
                         "servers: servers.judge: [{launch: {model: FOLDER_OR_ID}}], or the url of one that runs; or "
                         "take quality.method: tournament")
    overridden = any(flag_name(name) == "json-model-override-args" for s in config.servers.judge
                     for name in (*s.settings.flags, *config.generation.judge.engine))
    if not overridden and (why := no_reward_model(config.judge_model)):
        raise InputError(f"quality.model: {config.judge_model.path} is no reward model: {why}; name one with a scalar "
                         "head (...ForSequenceClassification with one label, or ...ForRewardModel) in quality.model or "
                         "servers.judge, or take quality.method: tournament")
    tokenizer, answer = load_tokenizer(*_model(config, "judge"), needs_template=False), "sampleanswer"
    system = [] if inputs.judge_system is None else [{"role": "system", "content": inputs.judge_system}]
    turns = [*system, {"role": "user", "content": "samplequestion"}, {"role": "assistant", "content": answer}]
    text = apply(tokenizer, [turns], inputs.chat_templates["judge"], answered=True)[0]
    if answer not in text.casefold():
        raise InputError("generation.judge.chat_template: it leaves the assistant's turn out, which is what a reward "
                         f"model scores: a chat with the answer {answer!r} renders as {text[:200]!r}")


def check_system_turns(config: RunConfig, inputs: Inputs, with_system: int) -> None:
    """Raises InputError where system turns meet a chat template that refuses them; warns where it leaves them out.

    `with_system`: how many prompts have one.
    """
    judge = inputs.judge_template
    for role, count in (("generator", with_system), ("judge", int(judge is not None and judge.system is not None))):
        if not count:
            continue
        model = config.model_of(role)
        what = system_turns(load_tokenizer(model, needs_template=False), inputs.chat_templates[role])
        whose = f"{count} prompts have" if role == "generator" else "the judge's template has"
        if what == "raise":
            raise InputError(f"generation.{role}.chat_template: {whose} a system turn, and the chat template of "
                             f"{model.path} takes none; drop it (generation.{role}.system_prompt), or name another "
                             "chat template")
        if what == "drop":
            log.warning("%s a system turn, and the chat template of %s leaves it out without a word: no request will "
                        "hold it", whose, model.path)
