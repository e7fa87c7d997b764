"""Before any request: everything that can be known to be wrong is found, and `run.json` is written."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import logging
import platform
from dataclasses import dataclass
from typing import Any

from flows.inputs import Inputs, check_reward_model, check_system_turns, check_verdicts, gather
from tasks.context import RUN_JSON, Context
from tasks.core.chat_template import DEFAULT_DATE
from tasks.core.config import RunConfig
from tasks.core.errors import InputError
from tasks.core.generation import RoleGeneration, complete, resolve_role
from tasks.core.heuristics import Heuristic, fold, unfolded
from tasks.core.identity import digest
from tasks.core.resolve import Origins, flatten, origins_of
from tasks.core.store import Store
from tasks.core.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from tasks.generation.prompts import PATH, PromptSet, read_prompts, shard_count, write_prompts
from tasks.labels.quality.judgements import check_cache
from tasks.serving.compile import ignored_by_speculation

log = logging.getLogger("winnow.prepare")

_PACKAGES = ("winnow", "prefect", "pyarrow", "polars", "torch", "transformers", "sentence-transformers", "sacrebleu",
             "math-verify", "aiohttp", "datasets")


@dataclass(frozen=True)
class Sampling:
    """What is sampled and how, before any prompt is read."""

    inputs: Inputs
    generation: dict[str, RoleGeneration]
    """Every field that is sent, by role."""
    heuristics: list[Heuristic]
    """As executed: completed by what stands above and below them, equal ones folded."""
    named: int
    """How many there were before equal ones were folded."""

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """What decides which tokens are asked for and how they are judged, for the run's identity."""
        generator = self.candidate_identity(config)
        if config.generation.generator.sampling_mask:
            # it changes no token and is in no candidate's id, but a run whose rows have it in part is no use
            generator["sampling_mask"] = True
        out: dict[str, Any] = {"heuristics": {h.id: h.name for h in self.heuristics},
                               "generation": {"generator": generator}}
        if template := self.inputs.judge_template:
            out["generation"]["judge"] = self.generation["judge"].identity() | {
                name: self.generation["judge"][name] for name in ("temperature", "top_k", "top_p", "min_p")} | {
                "chat_template": self.inputs.chat_templates["judge"].digest, "template": template.digest}
        elif "judge" in self.inputs.chat_templates:  # a reward model: nothing is sampled
            out["generation"]["judge"] = {"chat_template": self.inputs.chat_templates["judge"].digest,
                                          "system_prompt": self.inputs.judge_system}
        return out

    def candidate_identity(self, config: RunConfig) -> dict[str, Any]:
        """The generation config as it is part of every candidate's id (a source's own is put over it by the grid)."""
        return self.generation["generator"].identity() | {
            "chat_template": self.inputs.chat_templates["generator"].digest,
            "system_prompt": config.generation.generator.system_prompt or None,  # an empty one is none
        } | ({"engine": dict(flags)} if (flags := config.generation.generator.engine) else {})


def resolve_sampling(config: RunConfig, origins: Origins, recorded: dict[str, Any] | None = None) -> Sampling:
    """Resolve each role's requests and the heuristics, from the config and the files that it names.

    `recorded`: the `run.json` that the config is from, which holds those files. Raises InputError, UnreachableError.
    """
    inputs = gather(config, (recorded or {}).get("inputs"))
    model = inputs.model_defaults
    generation = {role: resolve_role(role, config.generation.role(role), origins,
                                     model if role == "generator" else None, config.run_seed)
                  for role in inputs.chat_templates}
    family = config.heuristics.family
    found = unfolded(family, inputs.heuristics, model.processors if model else ())
    done = fold(complete(h, generation["generator"], model, config.heuristics.fill_from_model) for h in found)
    return Sampling(inputs, generation, done, len(found))


@dataclass(frozen=True)
class Plan:
    """What a config asks for, checked; nothing sent, nothing written in the run. Its prompts want closing."""

    config: RunConfig
    origins: Origins
    sampling: Sampling
    prompts: PromptSet
    tokenizer: Any

    @property
    def heuristics(self) -> list[Heuristic]:
        """The heuristics, as executed."""
        return self.sampling.heuristics

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the dataset's rows."""
        return self.config.identity() | self.sampling.identity(self.config)

    @property
    def shards(self) -> int:
        """Shards of the run."""
        return shard_count(len(self.prompts), self.config.engine.shard_prompts)

    @property
    def requests(self) -> int:
        """Cells of the grid."""
        return len(self.prompts) * len(self.heuristics) * len(self.config.seeds)

    def judge_calls(self) -> int:
        """Most judge calls the labels can take."""
        if "quality" not in self.config.labels:
            return 0
        from tasks.labels.quality.labeller import calls_of

        return len(self.prompts) * len(self.config.seeds) * calls_of(len(self.heuristics), self.config)


def check(config: RunConfig, origins: Origins, recorded: dict[str, Any] | None = None) -> Plan:
    """Read and check everything a run needs but its servers.

    `recorded`: the `run.json` that the config is from. Raises InputError, UnreachableError (a hub that is needed).
    """
    origins, runner = origins or origins_of(config), config.engine.task_runner
    if runner != "threads" and importlib.util.find_spec(f"prefect_{runner}") is None:
        raise InputError(f"engine.task_runner: {runner} needs its extra: pip install 'winnow[{runner}]'")
    tokenizer = load_tokenizer(config.model, needs_template=config.generation.generator.chat_template is None)
    sampling = resolve_sampling(config, origins, recorded)
    for note in sampling.inputs.model_defaults.notes if sampling.inputs.model_defaults else ():
        log.warning("generation_config.json: %s", note)
    _check_tokens(config, sampling, tokenizer)
    _check_speculation(config, sampling.heuristics)
    _check_judge(config, sampling)
    for role, template in sampling.inputs.chat_templates.items():
        if template.stamps_date:
            log.warning("the %s's chat template stamps the date: it is told %s, whatever the day "
                        "(generation.%s.template_date)", role, template.date, role)
        elif config.generation.role(role).template_date != DEFAULT_DATE:
            log.warning("generation.%s.template_date: its chat template stamps no date, so the day changes nothing",
                        role)
    if "verifiers" not in config.labels and any(s.verifier for s in config.sources):
        log.warning("labels has no verifiers: no answer will be checked, although a source names a verifier")
    if "diversity" in config.labels and len(config.seeds) < 2:
        log.warning("diversity is measured across seeds: with one seed it is null")
    plan = Plan(config, origins, sampling, read_prompts(config), tokenizer)
    try:
        check_system_turns(config, sampling.inputs, plan.prompts.with_system)
        check_verdicts(config, sampling.inputs)
        check_reward_model(config, sampling.inputs)
        if recorded:
            _check_same_prompts(plan, recorded)
    except InputError:
        plan.prompts.close()
        raise
    return plan


def _check_tokens(config: RunConfig, sampling: Sampling, tokenizer: Any) -> None:
    ends = sampling.generation["generator"].values_from["stop_token_ids"]
    size = vocabulary_size(config.model, tokenizer)
    if outside := [t for t in ends.value if not 0 <= t < size]:
        raise InputError(f"generation.generator.stop_token_ids ({ends.origin}): {outside} are no token ids of "
                         f"{config.model.path}, whose vocabulary has {size}")


def _check_speculation(config: RunConfig, heuristics: list[Heuristic]) -> None:
    for n, server in enumerate(config.servers.generator):
        wanted = server.settings
        if wanted.speculation.on and (why := ignored_by_speculation(heuristics, wanted.deterministic)):
            where = f"servers.generator.{n}.{'launch' if server.launch else 'expect'}.speculation"
            raise InputError(f"{where}: {wanted.speculation.algorithm} silently ignores custom logit processors and "
                             f"min_p, which {why} need; set it to off, or choose heuristics that are a temperature "
                             "alone (with deterministic: false also a single top_k or top_p)")


def _check_judge(config: RunConfig, sampling: Sampling) -> None:
    """A native min_p ends a server that honours seeds, and a verdict is read before any cut."""
    judge = sampling.generation.get("judge")
    own, shared = config.generation.judge, config.generation.generator
    for key in ("context_length", "engine") if judge and not config.servers.judge else ():
        if getattr(own, key) and getattr(own, key) != getattr(shared, key):
            raise InputError(f"generation.judge.{key}: there is no servers.judge, so the generators judge, and they "
                             f"are what generation.generator.{key} says; set that, or name servers that judge")
    if judge and sampling.inputs.judge_template and judge["min_p"] > 0 and any(
            s.settings.deterministic for s in config.servers.judge or config.servers.generator):
        raise InputError(f"generation.judge.min_p ({judge.values_from['min_p'].origin}): SGLang dies of a min_p where "
                         "it honours seeds, and a verdict is read from the probabilities before any cut; drop it, or "
                         "let the judge's servers run with deterministic: false")


def _check_same_prompts(plan: Plan, recorded: dict[str, Any]) -> None:
    """A run.json stands for its prompts and tokenizer too: it does not hold them, but it knows them."""
    try:
        before = RunConfig.model_validate(recorded["config"])
    except ValueError as error:  # what --set mended
        raise InputError("run.json: config: not one that this version of Winnow takes; use the config that the run was "
                         "begun with") from error
    same = (before.sources == plan.config.sources
            and before.generation.generator.system_prompt == plan.config.generation.generator.system_prompt)
    if same and recorded["prompts_digest"] != plan.prompts.digest:
        was = recorded["prompts"]
        raise InputError(f"sources: the prompts are not those of the recorded run ({len(plan.prompts)} now, {was} "
                         "then, or others): a file in sources was edited; put it back, or use a config of your own")
    if before.model == plan.config.model and recorded["tokenizer"] != fingerprint(plan.tokenizer):
        raise InputError(f"model.path: the tokenizer of {plan.config.model.path} is not that of the recorded run; pin "
                         "model.revision, or put the files back")


def open_run(plan: Plan) -> Context:
    """Write `run.json` and `prompts.parquet` (or find them as they should be) and open the run.

    Raises InputError, the difference shown, when a run of this name has another config.
    """
    config = plan.config
    store = Store(config.url)
    store.sweep()
    known = store.read_json(RUN_JSON)
    identity, sampling = plan.identity, plan.sampling
    if known is not None:
        _refuse_changes(known["identity"], identity, store.display())
    check_cache(config, store)
    # prompts first: a changed source must not leave a run.json that speaks of other prompts
    template = sampling.inputs.chat_templates["generator"]
    shards = write_prompts(store, config, plan.prompts, plan.tokenizer, template)
    _check_lengths(store, plan)
    raw: dict[str, Any] = {
        "winnow": _version("winnow"), "run": config.run,
        "created": known["created"] if known else _now(), "config": config.model_dump(mode="json"),
        "config_digest": digest(identity), "origins": plan.origins, "identity": identity,
        "heuristics": [{"id": h.id, "name": h.name, "aliases": list(h.aliases),
                        "processors": [{"name": p.name, "params": p.params} for p in h.processors]}
                       for h in plan.heuristics],
        "shards": shards, "prompts": len(plan.prompts), "prompts_digest": plan.prompts.digest,
        "tokenizer": fingerprint(plan.tokenizer),
        "generation": {role: found.recorded() for role, found in sampling.generation.items()},
        "candidate_identity": sampling.candidate_identity(config),
        "templates": _templates(plan), "inputs": sampling.inputs.recorded(config),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "python": platform.python_version(), "platform": platform.platform(),
        "servers": known["servers"] if known else {"generator": [], "judge": []},
        "finished": known.get("finished") if known else None,
    } | {key: known[key] for key in ("servers_differ",) if known and key in known}
    if raw != known:
        store.write_json(RUN_JSON, raw)
    if store.read_json("generation_config.json") != (sent := _as_sent(plan)):
        store.write_json("generation_config.json", sent)
    return Context(config.url)


def _check_lengths(store: Store, plan: Plan) -> None:
    """Raises InputError where prompts are too long for the context that the config asks for."""
    config, generation = plan.config, plan.sampling.generation["generator"]
    role = config.generation.generator.context_length
    lengths = [c for s in config.servers.generator if (c := s.settings.context_length or role)]
    manifest = store.manifest(PATH)
    longest = (manifest.facts if manifest else {}).get("longest")
    if lengths and longest and longest + generation["max_new_tokens"] > min(lengths):
        raise InputError(f"generation.generator.context_length: the longest prompt has {longest} tokens, and "
                         f"{generation['max_new_tokens']} new ones do not fit into {min(lengths)}; raise it, or lower "
                         "max_new_tokens")


def _templates(plan: Plan) -> dict[str, Any]:
    """Digests of what shapes a prompt beside its text."""
    config, out = plan.config, {}
    for role, template in plan.sampling.inputs.chat_templates.items():
        system = config.generation.role(role).system_prompt
        out[role] = {k: v for k, v in template.recorded().items() if k != "source"} | {
            "system_prompt": None if system is None else digest(system)}
    if judge := plan.sampling.inputs.judge_template:
        out["judge"]["judge_template"] = judge.digest
        out["judge"]["system_prompt"] = None if judge.system is None else digest(judge.system)
    own = {s.name: digest(s.system_prompt) for s in config.sources if s.system_prompt is not None}
    return out | ({"sources": own} if own else {})


def _as_sent(plan: Plan) -> dict[str, Any]:
    """`generation_config.json` beside the outputs: what is sent, by role, and what the model's own file said."""
    model = plan.sampling.inputs.model_defaults
    return {
        **{role: dict(found) for role, found in plan.sampling.generation.items()},
        "heuristics": "each names its own temperature and cuts; see run.json",
        "model": {"source": model.source, "as_read": model.raw} if model else None,
    }


def _refuse_changes(known: dict[str, Any], wanted: dict[str, Any], run: str) -> None:
    before, now = flatten(known), flatten(wanted)
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if changed:
        lines = [f"  {k}: was {_shown(before, k)}, now {_shown(now, k)}" for k in changed[:12]]
        more = [f"  and {len(changed) - 12} more"] if len(changed) > 12 else []
        raise InputError("\n".join([f"{run}: this run was begun with another config:", *lines, *more,
                                    "Take the change back, or start another run with --run NAME."]))


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not there"


def update_run(store: Store, **facts: Any) -> None:
    """Write more facts into `run.json`."""
    store.write_json(RUN_JSON, store.read_json(RUN_JSON) | facts)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
