"""Before any request: everything that can be known to be wrong is found, and `run.json` is written."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import logging
import platform
from dataclasses import dataclass
from typing import Any

from tasks.context import RUN_JSON, Context
from tasks.core.config import RunConfig
from tasks.core.errors import InputError
from tasks.core.heuristics import Heuristic, expand
from tasks.core.identity import digest
from tasks.core.resolve import Origins, flatten
from tasks.core.store import Store
from tasks.core.tokenizer import fingerprint, load_tokenizer
from tasks.generation.prompts import PromptSet, read_prompts, shard_count, write_prompts

log = logging.getLogger("winnow.prepare")

_PACKAGES = ("winnow", "prefect", "pyarrow", "polars", "torch", "transformers", "sentence-transformers", "sacrebleu",
             "math-verify", "aiohttp", "datasets")


@dataclass(frozen=True)
class Plan:
    """What a config asks for, checked; nothing sent, nothing written in the run. Its prompts want closing."""

    config: RunConfig
    origins: Origins
    heuristics: list[Heuristic]
    prompts: PromptSet
    tokenizer: Any

    @property
    def shards(self) -> int:
        """Shards of the run."""
        return shard_count(len(self.prompts), self.config.engine.shard_prompts)

    @property
    def requests(self) -> int:
        """Cells of the grid."""
        return len(self.prompts) * len(self.heuristics) * len(self.config.seeds)

    def judge_calls(self) -> int:
        """Most judge calls the tournaments can take."""
        if "quality" not in self.config.labels:
            return 0
        from tasks.labels.quality.labeller import planned_calls

        per_group = planned_calls(len(self.heuristics), self.config.quality.extra_rounds)
        return len(self.prompts) * len(self.config.seeds) * per_group


def check(config: RunConfig, origins: Origins) -> Plan:
    """Read and check everything a run needs but its servers. Raises InputError."""
    runner = config.engine.task_runner
    if runner != "threads" and importlib.util.find_spec(f"prefect_{runner}") is None:
        raise InputError(f"engine.task_runner: {runner} needs its extra: pip install 'winnow[{runner}]'")
    heuristics = expand(config.heuristics.family, config.heuristics.files)
    tokenizer = load_tokenizer(config.model)
    if "quality" in config.labels:
        _check_judge(config)
    if "verifiers" not in config.labels and any(s.verifier for s in config.sources):
        log.warning("labels has no verifiers: no answer will be checked, although a source names a verifier")
    if "diversity" in config.labels and len(config.seeds) < 2:
        log.warning("diversity is measured across seeds: with one seed it is null")
    return Plan(config, origins, heuristics, read_prompts(config), tokenizer)


def _check_judge(config: RunConfig) -> None:
    from tasks.labels.quality.templates import load_template

    try:
        template = load_template(config.quality.template)
        template.verdict_token_ids(load_tokenizer(config.judge_model, "quality.model.path"))
    except ValueError as error:
        raise InputError(f"quality.template: {error}") from error


def open_run(plan: Plan) -> Context:
    """Write `run.json` and `prompts.parquet` (or find them as they should be) and open the run.

    Raises InputError, the difference shown, when a run of this name has another config.
    """
    config = plan.config
    store = Store(config.url)
    store.sweep()
    known = store.read_json(RUN_JSON)
    identity = config.identity() | {"heuristics": {h.id: h.name for h in plan.heuristics}}
    if known is not None:
        _refuse_changes(known["identity"], identity, store.display())
    # prompts first: a changed source must not leave a run.json that speaks of other prompts
    shards = write_prompts(store, config, plan.prompts, plan.tokenizer)
    raw: dict[str, Any] = {
        "winnow": _version("winnow"), "run": config.run,
        "created": known["created"] if known else _now(), "config": config.model_dump(mode="json"),
        "config_digest": digest(identity), "origins": plan.origins, "identity": identity,
        "heuristics": [{"id": h.id, "name": h.name, "aliases": list(h.aliases),
                        "processors": [{"name": p.name, "params": p.params} for p in h.processors]}
                       for h in plan.heuristics],
        "shards": shards, "prompts": len(plan.prompts), "tokenizer": fingerprint(plan.tokenizer),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "python": platform.python_version(), "platform": platform.platform(),
        "servers": known["servers"] if known else {"generator": [], "judge": []},
        "finished": known.get("finished") if known else None,
    }
    if raw != known:
        store.write_json(RUN_JSON, raw)
    return Context(config.url)


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
