"""The main flow: prompts in, training set out; sub-flows generate, label and publish."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.artifacts import artifact_key
from flows.prepare import Plan, check, open_run, update_run
from flows.servers import running
from flows.stages import run_stages
from tasks.context import Context, context, reopen
from tasks.core.config import RunConfig
from tasks.core.errors import ThresholdError
from tasks.core.resolve import Origins
from tasks.core.store import Store
from tasks.generation.candidates import Candidates
from tasks.generation.verify import Verified
from tasks.labels import labellers
from tasks.pipeline import needs_servers, reconsider, shortfall
from tasks.publish.dataset import FOLDER, write_dataset
from tasks.publish.score import Scores, write_stats

log = logging.getLogger("winnow.build")

# who is told what happens; the terminal sets its own
notice: Callable[[str], None] = log.info
# what this process has just checked, so that the sources are not read twice; the command line sets it
checked: Plan | None = None


def task_runner(config: RunConfig) -> TaskRunner[Any]:
    """The task runner that the config names; `check` has made sure that its package is there."""
    engine = config.engine
    if engine.task_runner == "threads":
        return ThreadPoolTaskRunner(max_workers=engine.max_workers)
    if engine.task_runner == "dask":
        from prefect_dask import DaskTaskRunner  # type: ignore[import-not-found]

        return DaskTaskRunner(cluster_kwargs={"n_workers": engine.max_workers, "threads_per_worker": 1,
                                              "host": "127.0.0.1", "dashboard_address": None})
    from prefect_ray import RayTaskRunner  # type: ignore[import-not-found]

    return RayTaskRunner(init_kwargs={"num_cpus": engine.max_workers, "include_dashboard": False})


@flow(name="winnow", flow_run_name="{config.run}", validate_parameters=True, persist_result=False)
def build_dataset(config: RunConfig, origins: Origins | None = None) -> dict[str, Any]:
    """Build a dataset; run it again and it resumes. The report's figures.

    Raises ThresholdError when the run finished below a threshold of its config.
    """
    plan = _take_checked(config) or check(config, origins or {})
    with Store(config.url).lock():
        with plan.prompts:
            ctx = reopen(open_run(plan).url)
        if (ctx.raw.get("finished") or {}).get("problem"):
            reconsider(ctx)
        if needs_servers(ctx):
            with running(ctx, notice) as served:
                _generate_and_label(served.url, config)
        else:
            _generate_and_label(ctx.url, config)
        data = publish.with_options(flow_run_name=f"{config.run}-publish")(ctx.url)
        problem = shortfall(context(ctx.url))
        update_run(ctx.store, finished={
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "problem": problem})
    if problem:
        raise ThresholdError(problem)
    return data


def _take_checked(config: RunConfig) -> Plan | None:
    global checked
    plan, checked = checked, None
    return plan if plan is not None and plan.config == config else None


def _generate_and_label(url: str, config: RunConfig) -> None:
    generate.with_options(flow_run_name=f"{config.run}-generate", task_runner=task_runner(config))(url)
    if config.labels:
        label.with_options(flow_run_name=f"{config.run}-label", task_runner=task_runner(config))(url)


@flow(name="winnow-generate", persist_result=False)
def generate(url: str) -> None:
    """Candidates of every shard, each verified (and repaired) as soon as it is whole."""
    run_stages(url, [[Candidates.name, Verified.name]], _window(url))


@flow(name="winnow-label", persist_result=False)
def label(url: str) -> None:
    """Every labeller over every shard."""
    run_stages(url, [[x.name] for x in labellers(context(url).config.labels)], _window(url))


@flow(name="winnow-publish", persist_result=False)
def publish(url: str) -> dict[str, Any]:
    """Scores, dataset, card, report, and the result as an artifact."""
    from tasks.publish.card import card
    from tasks.publish.report import gather, markdown, plot_png, render_html

    ctx = context(url)
    splits: dict[str, int] = {}
    if ctx.config.labels:
        write_stats(ctx)
        run_stages(url, [[Scores.name]], _window(url))
        splits = write_dataset(ctx)
    data = gather(ctx)
    key = data.get("config_digest") or "report"
    ctx.store.write_bytes("report.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode(), key)
    ctx.store.write_bytes("report.html", render_html(data).encode(), key)
    if splits:
        ctx.store.write_bytes(f"{FOLDER}/README.md", card(ctx, data, splits).encode(), key)
    _artifact(ctx, markdown(data), plot_png(data))
    return data


def _window(url: str) -> int:
    return 2 * context(url).config.engine.max_workers


def _artifact(ctx: Context, text: str, png: bytes) -> None:
    import base64

    picture = f"![result](data:image/png;base64,{base64.b64encode(png).decode()})"
    key = artifact_key(ctx.config.run, "result")
    try:
        create_markdown_artifact(f"{text}\n\n{picture}\n", key=key, description=f"Result of {ctx.config.run}")
    except Exception as error:  # the dataset stands whether or not the UI takes its picture
        log.warning("the result could not be shown as an artifact: %s", error)
