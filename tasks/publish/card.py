"""The dataset's card: a README.md whose front matter the Hub and `datasets.load_dataset` read."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.context import Context
from tasks.core import schema
from tasks.core.config_file import as_yaml
from tasks.core.generation import CUTS
from tasks.publish.report import best_by_source
from tasks.publish.report_counts import defect_kinds, funnel_steps
from tasks.publish.report_judge import how_rated, judge_lines, shrinkage_note
from tasks.publish.report_parts import RANKED_BY, count, escape, figure_text, markdown_table, num

PATH = "dataset/README.md"
# upper bounds and names of the Hub's size categories
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))
_FOLDED = 40
_BEST = 20
# addresses and paths say nothing to a reader and much about a network
_SERVER_FACTS = ("honours_seeds", "custom_processors", "version", "dtype", "quantization", "device", "tp_size",
                 "sampling_backend", "attention_backend", "enable_deterministic_inference")


def card(ctx: Context, data: dict[str, Any], splits: dict[str, int]) -> str:
    """The card of a written dataset. `data`: what `report.gather` returned; `splits`: rows by split.

    A split without rows has no file and is not named.
    """
    splits = {split: rows for split, rows in splits.items() if rows}
    columns = _columns(ctx, splits)
    parts = [
        f"---\n{as_yaml(front_matter(ctx, splits))}---",
        *_about(ctx, data, splits), *_counts(data), *_sources(ctx, data), *_sampling(ctx, data),
        *_labels(ctx, data, columns), *_made_with(ctx, data), *_column_table(columns),
        *_limits(data, ctx), *_use(splits), *_rebuild(ctx),
    ]
    return "\n".join(parts) + "\n"


def front_matter(ctx: Context, splits: dict[str, int]) -> dict[str, Any]:
    """The card's YAML head."""
    config, total = ctx.config, sum(splits.values())
    out: dict[str, Any] = {
        "pretty_name": config.run, "license": (config.dataset.license or "other").lower(),
        "task_categories": ["text-generation"], "tags": ["synthetic", "sampling", "decoding", "best-of-n", "winnow"],
        "size_categories": [next((name for limit, name in _SIZES if total < limit), "n>100M")],
    }
    if splits:
        out["configs"] = [{"config_name": "default", "data_files": [
            {"split": split, "path": f"{split}.parquet"} for split in splits]}]
    return out


def _about(ctx: Context, data: dict[str, Any], splits: dict[str, int]) -> list[str]:
    per = " and ".join(data["per"])
    rows = ", ".join(f"{count(n)} in `{split}`" for split, n in splits.items()) or "none"
    best = "The best answer" if data["top_k"] == 1 else f"The {data['top_k']} best answers"
    return [
        "", f"# {escape(ctx.config.run)}", "",
        f"{best} per {per} out of {count(data['requests']['rows'])} that "
        f"{escape(data['model'])} gave to {count(data['prompts'])} prompts under {count(len(data['heuristics']))} "
        f"sampling heuristics and {count(data['seeds'])} seed{'s' if data['seeds'] != 1 else ''}. Each row says which "
        "heuristic won, with token ids, log-probabilities and labels, so that a sampler can learn from it.", "",
        f"Rows: {rows}. The split is by prompt: no prompt is in both.", "",
    ]


def _counts(data: dict[str, Any]) -> list[str]:
    steps = [(k, count(n)) for k, n in funnel_steps(data)]
    out = ["## From plan to dataset", "", *markdown_table(("stage", "rows"), steps), ""]
    if data["funnel"]["checked"]:
        out += [f"Where verified, {count(data['funnel']['correct'])} of {count(data['funnel']['checked'])} answers are "
                "correct.", ""]
    if data["drops"]:
        out += [*markdown_table(("not kept because", "rows"), [(k, count(n)) for k, n in data["drops"].items()]), ""]
    if kinds := defect_kinds(data):
        rows = [(k, count(found), count(left)) for k, found, left in kinds]
        out += [*markdown_table(("failed by kind", "before repair", "rows left"), rows), ""]
    requests, verified = data["requests"], data["verification"]
    out += [f"{count(requests['attempts'])} requests were sent, {count(requests['retries'])} of them again; "
            f"{count(verified['repaired'])} failed cells were mended. {count(verified['at_max_new_tokens'])} answers "
            "end where `max_new_tokens` cut them (`finish_reason` length).", ""]
    return out


def _sources(ctx: Context, data: dict[str, Any]) -> list[str]:
    paths = {s.name: (s.path, s.revision) for s in ctx.config.sources}
    rows = []
    for s in data["sources"]:
        path, revision = paths[s["name"]]
        kept = count(s["figures"]["kept"]) if s["figures"] else "0"
        rows.append((s["name"], f"{path} at {revision}" if revision else path, s["license"] or "not stated",
                     count(s["prompts"]), s["verifier"] or "none", kept))
    head = ("source", "read from", "licence", "prompts", "verifier", "rows kept")
    return ["## Sources", "", *markdown_table(head, rows), ""]


def _sampling(ctx: Context, data: dict[str, Any]) -> list[str]:
    figures = {h["id"]: h for h in data["heuristics"]}
    rows = []
    for h in ctx.heuristics:
        known = figures.get(h.id, {})
        metric = data["ranked_by"]
        rows.append((" = ".join((h.name, *h.aliases)), h.describe(),
                     figure_text(known, metric) if metric and known else num(None), count(known.get("kept"))))
    label = RANKED_BY[data["ranked_by"]].words if data["ranked_by"] else "rating"
    table = markdown_table(("heuristic", "processors in their order", f"{label} (95 % interval)", "rows kept"), rows)
    if len(rows) > _FOLDED:
        table = [f"<details><summary>{len(rows)} heuristics</summary>", "", *table, "", "</details>"]
    return [
        "## How candidates were sampled", "",
        f"Model {escape(data['model'])}, revision {escape(data['revision'] or 'not pinned')}. Every "
        "prompt was sampled with every heuristic and seed; each request had a sampling seed of its own "
        "(`request_seed`).", "", *table, "", *_about_intervals(data), "Beside the heuristic, every request said:", "",
        *_sent(ctx), "", *_template_notes(ctx), "", *best_by_source(data, _BEST)]


def _about_intervals(data: dict[str, Any]) -> list[str]:
    if not data["ranked_by"]:
        return []
    text = ("Intervals are about the mean over more prompts like these, labelled in the same way; a prompt is one "
            "observation, and one prompt alone has none.")
    return [escape(" ".join(filter(None, (text, shrinkage_note(data))))), ""]


def _sent(ctx: Context) -> list[str]:
    """The fields that no heuristic governs, each with its origin."""
    rows = [(name, str(value.value), value.origin)
            for name, value in ctx.generation("generator").values_from.items()
            if name not in ("temperature", *CUTS)]
    return markdown_table(("field", "value", "from"), rows)


def _template_notes(ctx: Context) -> list[str]:
    found = ctx.raw["templates"]["generator"]
    date = f", told the date {found['date']} whatever the day" if found.get("stamps_date") else ""
    system = f", system prompt `{found['system_prompt']}`" if found["system_prompt"] else ""
    return [f"Chat template `{found['digest']}` ({escape(found['origin'])}{date}){system} (digests)."]


def _labels(ctx: Context, data: dict[str, Any], columns: pa.Schema) -> list[str]:
    out = ["## How it was labelled", ""]
    if "quality" in data["labels"]:
        out.append(f"- Quality: {escape(' '.join(how_rated(data)))} {_quality_columns(data)}")
    if "diversity" in data["labels"]:
        out.append("- Diversity: self-BLEU and embedding entropy of the answers to one prompt under one heuristic.")
    if "verifiers" in data["labels"]:
        names = sorted({s["verifier"] for s in data["sources"] if s["verifier"]})
        out.append(f"- Correctness: {escape(', '.join(names) or 'no source has a verifier')}.")
    if not data["labels"]:
        out.append("Not labelled.")
    weights = ", ".join(f"{k} {v:g}" for k, v in data["weights"].items())
    wrong = "" if "verifiers" not in data["labels"] else (
        f"; answers found wrong are {'left out' if data['incorrect'] == 'drop' else 'kept'}")
    out += ["", f"`score` is the weighted mean of the z-scores there are ({weights}){wrong}.", ""]
    if lines := judge_lines(data):
        out += ["What was measured of " + ("the reward model:" if data["reward_model"] else "the judge:"), "",
                *markdown_table(("figure", "value"), lines), ""]
    signatures = [(f.name, f.metadata[b"signature"].decode()) for f in columns if b"signature" in (f.metadata or {})]
    return [*out, *markdown_table(("column", "signature"), signatures), ""] if signatures else out


def _quality_columns(data: dict[str, Any]) -> str:
    """Which columns the labels of quality are in, and which are empty."""
    if data["quality"]["method"] == "pointwise":
        return ("The score is in `rm_score`; no pairs were compared, so `rating`, `rating_se`, `comparisons` and "
                "`reliability` are null.")
    return ("The rating is in `rating`, its standard error in `rating_se`; `reliability` is the share of the variance "
            "of a group's true ratings that its ratings explain, as the fit estimates it; it is equal on all rows of a "
            "group, to weigh groups or leave them out. `rm_score` is null: no reward model scored answers one by one.")


def _columns(ctx: Context, splits: dict[str, int]) -> pa.Schema:
    """The schema as written, metric signatures included."""
    for split in splits:
        if ctx.store.exists(path := f"dataset/{split}.parquet"):
            with ctx.store.open(path) as file:
                return pq.read_schema(file)
    return schema.DATASET


def _made_with(ctx: Context, data: dict[str, Any]) -> list[str]:
    out = ["## Made with", ""]
    if created := ctx.raw.get("created"):
        out += [f"Begun {escape(created)}; config {escape(data['config_digest'])}.", ""]
    versions = {k: v for k in ("python", "platform") if (v := ctx.raw.get(k))} | (ctx.raw.get("versions") or {})
    if versions:
        out += [*markdown_table(("package", "version"), sorted(versions.items())), ""]
    for role, servers in (ctx.raw.get("servers") or {}).items():
        for n, facts in enumerate(servers or [], 1):
            told = "; ".join(f"{k} {v}" for k, v in (facts | (facts.get("info") or {})).items()
                             if k in _SERVER_FACTS and v is not None)
            out.append(f"- {escape(role)} {n}: {escape(told or 'never answered')}")
    return [*out, ""]


def _column_table(columns: pa.Schema) -> list[str]:
    rows = [(f.name, _type(f.type), (f.metadata or {}).get(b"description", b"").decode()) for f in columns]
    return ["## Columns", "", "Missing is null.", "", *markdown_table(("column", "type", "what it is"), rows), ""]


def _type(kind: pa.DataType) -> str:
    """`list of int32`, `list of {role, content}`."""
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(f.name for f in kind) + "}"
    return str(kind)


def _limits(data: dict[str, Any], ctx: Context) -> list[str]:
    seeds = data["requests"]["seed_effective"]
    out = [*_quality_limits(data),
           "`output_logprobs` are the server's: after temperature and custom processors, before native top_k, top_p "
           "and min_p."]
    out += [escape(line) for line in _mismatches(ctx)]
    if ctx.config.generation.generator.sampling_mask:
        out.append("`kept_ids` and `kept_logprobs` were recorded for native top_k only; elsewhere they are null.")
    if any(k != "true" for k in seeds):
        others = sum(n for k, n in seeds.items() if k != "true")
        out.append(f"`seed_effective` is not true for {count(others)} of {count(sum(seeds.values()))} answers: their "
                   "server did not honour the seed, so the same request may give another answer.")
    else:
        out.append("`seed_effective` is true: the same server, version and hardware give the same answer to the same "
                   "request; others may not.")
    if data["drops"]:
        out.append("Rows were selected by these labels, so what the labels favour is over-represented.")
    out.append("The texts are a model's output: they may be wrong. Its licence applies beside those of the sources.")
    return ["## Known limits", "", *(f"- {line}" for line in out), ""]


def _quality_limits(data: dict[str, Any]) -> list[str]:
    """What quality labels are no measure of."""
    q = data["quality"]
    if not q:
        return []
    judged = "The model that wrote the answers judged them itself. " if q["judged_itself"] else ""
    if q["method"] == "pointwise":
        return ["`rm_score` compares answers to one prompt only: a score has its prompt's own level.",
                f"{judged}What the reward model gets wrong every time is in all scores."]
    return ["Ratings compare answers within one (prompt, seed) only; elsewhere the opponents were others.",
            f"{judged}What the judge gets wrong every time is in all ratings, and neither `rating_se` nor an interval "
            "tells of it."]


def _mismatches(ctx: Context) -> list[str]:
    """In what servers were not what the run asked for, as it allowed; and in what they were unlike each other."""
    found: dict[str, int] = {}
    for role, servers in (ctx.raw.get("servers") or {}).items():
        for server in servers or [] if role == "generator" or "quality" in ctx.config.labels else ():
            for d in server.get("mismatch") or []:
                wanted = "left that to SGLang" if d["asked"] is None else f"asked for {d['asked']}"
                text = f"a {role} server was used with {d['field']} {d['found']}, the run {wanted}"
                found[text] = found.get(text, 0) + 1
    unlike = sum(map(len, (ctx.raw.get("servers_differ") or {}).values()))
    return [f"{text} ({n} of them)." if n > 1 else f"{text}." for text, n in found.items()] + (
        [f"Servers of one role were unlike in {unlike} settings that shape tokens; `server` in the rows tells which "
         "one answered."] if unlike else [])


def _use(splits: dict[str, int]) -> list[str]:
    split = next(iter(splits), "train")
    return [
        "## How to load it", "", "```python", "import datasets",
        f'rows = datasets.load_dataset("path/to/this/folder", split="{split}")',
        "", "import polars", f'rows = polars.read_parquet("path/to/this/folder/{split}.parquet")', "```", "",
        "```sql", "-- duckdb",
        "SELECT heuristic, count(*) FROM 'path/to/this/folder/*.parquet' GROUP BY ALL ORDER BY 2 DESC;", "```", ""]


def _rebuild(ctx: Context) -> list[str]:
    text = as_yaml(rebuild_config(ctx)).rstrip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    files = (" The heuristics of `heuristics.files` are in the table above." if ctx.config.heuristics.files else "")
    return ["## How to build it again", "",
            f"Save this as `config.yaml`, add your `servers`, and run `winnow run config.yaml`.{files} The run's own "
            "`run.json` holds those files too: `winnow run run.json` is the same plan, id for id.", "",
            f"{fence}yaml", text, fence]


def rebuild_config(ctx: Context) -> dict[str, Any]:
    """The run's config as one would write it: no defaults, no addresses or folders of one machine."""
    config = ctx.config
    out = config.model_dump(mode="json", exclude_defaults=True, exclude={"servers", "runs_dir"})
    if config.judge_model != config.model:  # perhaps named by a server only
        out.setdefault("quality", {})["model"] = config.judge_model.model_dump(mode="json", exclude_none=True)
    return out
