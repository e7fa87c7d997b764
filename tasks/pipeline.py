"""The stages in their order, and what is left of a run."""

from __future__ import annotations

from tasks.context import Context
from tasks.core.config import RunConfig
from tasks.generation.candidates import Candidates
from tasks.generation.verify import FINAL, Verified
from tasks.labels import labellers
from tasks.publish.dataset import FOLDER
from tasks.publish.score import Scores
from tasks.stage import Stage, is_done, shard_file


def stage(name: str) -> Stage:
    """A stage by its name."""
    known: dict[str, Stage] = {s.name: s for s in (Candidates(), Verified(), Scores())}
    return known[name] if name in known else labellers([name])[0]


def stages_of(config: RunConfig) -> list[str]:
    """The stages of a config in their order."""
    return [Candidates.name, Verified.name, *(x.name for x in labellers(config.labels)),
            *([Scores.name] if config.labels else [])]


def pending(ctx: Context) -> list[str]:
    """What is still to do, in words; empty for a finished run. Reads every file: one that changed is made again."""
    out = []
    for name in stages_of(ctx.config):
        missing = sum(not is_done(stage(name), ctx, shard, deep=True) for shard in range(ctx.shards))
        if missing:
            out.append(f"{name} ({missing} of {ctx.shards} shards)")
            break  # what follows has no keys yet
    if not out and not (ctx.store.exists("report.json") and ctx.raw.get("finished")):
        out.append("publish")
    if not out and ctx.config.labels and not _dataset_stands(ctx):
        out.append("dataset")
    return out


def _dataset_stands(ctx: Context) -> bool:
    """Whether the card and every split that was written are there as they were written."""
    made = [f"{FOLDER}/{name}" for name in ("README.md", "train.parquet", "validation.parquet")]
    manifests = [m for path in made if (m := ctx.store.manifest(path))]
    return ctx.store.exists(made[0]) and all(
        ctx.store.state(m.path, m.key) == "done" for m in manifests)


def reconsider(ctx: Context) -> int:
    """Owe again the verification of shards whose failed candidates another attempt may mend; how many candidates.

    For a run that finished below its threshold and is called again: its servers may be better now.
    """
    if ctx.config.limits.incomplete_prompts != "repair":
        return 0
    owed = 0
    for shard in range(ctx.shards):
        manifest = ctx.store.manifest(path := shard_file("verified", shard))
        mendable = sum(n for kind, n in manifest.facts["defects"].items() if kind not in FINAL) if manifest else 0
        if mendable:
            ctx.store.forget(path)
            owed += mendable
    return owed


def needs_servers(ctx: Context, deep: bool = True) -> bool:
    """Whether a stage that asks servers has shards left; `deep` reads the files that stand."""
    asking = [Candidates.name, Verified.name, *(["quality"] if "quality" in ctx.config.labels else [])]
    return any(not is_done(stage(name), ctx, shard, deep=deep) for name in asking for shard in range(ctx.shards))


def shortfall(ctx: Context) -> str | None:
    """Why the finished run is below a threshold of its config, or None."""
    planned = failed = 0
    kinds: dict[str, int] = {}
    for shard in range(ctx.shards):
        manifest = ctx.store.manifest(shard_file("verified", shard))
        if manifest:
            planned += manifest.facts["planned"]
            for kind, n in manifest.facts["defects"].items():
                kinds[kind] = kinds.get(kind, 0) + n
                failed += n
    allowed = ctx.config.limits.max_failed
    if planned and failed / planned > allowed:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        return (f"{failed} of {planned} candidates failed ({failed / planned:.2%}: {counts}), limits.max_failed allows "
                f"{allowed:.2%}; see {ctx.store.display('report.html')}")
    if ctx.config.labels and not any(ctx.store.exists(f"{FOLDER}/{s}.parquet") for s in ("train", "validation")):
        return "no candidate was kept: the dataset is empty (see the drops by reason in the report)"
    return None
