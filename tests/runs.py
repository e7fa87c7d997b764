"""Small runs for tests: a config over a fake server, built stage by stage without Prefect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.prepare import check, open_run
from flows.servers import running
from tasks.context import Context, context, release
from tasks.core.config import RunConfig
from tasks.pipeline import stage, stages_of
from tasks.publish.dataset import write_dataset
from tasks.publish.score import write_stats
from tasks.stage import ensure

HEURISTICS = {"sampling_pipelines": [
    {"name": "warm", "processors": [{"name": "temperature", "params": {"temperature": 0.7}}]},
    {"name": "nucleus", "processors": [{"name": "temperature", "params": {"temperature": 1.0}},
                                       {"name": "top_p", "params": {"top_p": 0.9}}]},
    {"name": "typical", "processors": [{"name": "typical", "params": {"mass": 0.9}}]},
    {"name": "cut then heat", "processors": [{"name": "top_k", "params": {"top_k": 20}},
                                             {"name": "top_p", "params": {"top_p": 0.9}},
                                             {"name": "temperature", "params": {"temperature": 1.4}}]},
]}
QUESTIONS = [{"question": f"What is {n} + 5?", "answer": f"{n} + 5 = {n + 5}\n#### {n + 5}"} for n in (2, 7, 30)]
STORIES = [{"prompt": "Tell of a lamp that sings."}, {"prompt": "Tell of rain."}]


def make_config(folder: Path, model: Path, urls: list[str], **changes: Any) -> dict[str, Any]:
    """A raw config over two sources, four heuristics and two seeds; `changes` replace top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"sums": QUESTIONS, "stories": STORIES}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "heuristics.yaml").write_text(json.dumps(HEURISTICS))  # JSON is YAML
    return {
        "run": "test", "runs_dir": str(folder / "runs"), "model": {"path": str(model)},
        "servers": {"generator": [{"url": u, "max_in_flight": 8} for u in urls]},
        "sources": [
            {"name": "sums", "path": str(folder / "sums.jsonl"), "prompt_key": "question", "answer_key": "answer",
             "verifier": "gsm8k", "diversity": True},
            {"name": "stories", "path": str(folder / "stories.jsonl"), "diversity": True}],
        "heuristics": {"files": [str(folder / "heuristics.yaml")]}, "seeds": [0, 1],
        "generation": {"generator": {"max_new_tokens": 48}}, "engine": {"shard_prompts": 2},
        "labels": ["quality", "verifiers"], "quality": {"max_prompt_tokens": 1600},
        "limits": {"wait_for_servers_s": 2, "request_timeout_s": 5},
    } | changes


def expecting(raw: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The config, its generators (all, or those of `only`) expected to be so."""
    only = settings.pop("only", None)
    for server in raw["servers"]["generator"]:
        if only is None or server["url"] in only:
            server["expect"] = settings
    return raw


def build(raw: dict[str, Any], only: list[str] | None = None) -> Context:
    """Run the stages of a config here (all of them, or only those named); the run's context."""
    config = RunConfig.model_validate(raw)
    ctx = open_run(check(config, {}))
    try:
        with running(ctx, lambda _: None) as served:
            for name in only or stages_of(config):
                if name == "score":
                    write_stats(served)
                for shard in range(served.shards):
                    ensure(stage(name), served, shard)
            if not only and config.labels:
                write_dataset(served)
    finally:
        release(ctx.url)
    return context(ctx.url)
