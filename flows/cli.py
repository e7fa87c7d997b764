"""The command line: `winnow`, also `python -m flows.cli`.

Exit codes: 0 done; 2 the input is wrong; 3 finished below a threshold; 4 nothing to reach; 130
interrupted, run it again to resume.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from flows import terminal
from flows.cli_servers import servers_app
from flows.options import (
    ConfigArg,
    MismatchOption,
    RunArg,
    RunOption,
    RunsDir,
    SetOption,
    open_run_named,
    with_mismatch,
)
from tasks.core.errors import InputError, InterruptedRun, WinnowError
from tasks.core.resolve import flatten, load_config, recorded_run

app = typer.Typer(
    name="winnow", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Builds training sets of learned LLM samplers: many candidates per prompt from SGLang servers, verified, "
         "ranked, labelled, scored, filtered.\n\nStart with [bold]make demo[/bold], then copy configs/demo.yaml.",
    epilog="Exit codes: 0 done, 2 input wrong, 3 finished below a threshold, 4 no server answers, 130 interrupted "
           "(run it again to resume).")
app.add_typer(servers_app, name="servers")

# click's own class of usage errors, wherever this version of typer keeps click
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_debug = False


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show logs and tracebacks.")] = False) -> None:
    global _debug
    _debug = debug
    terminal.set_up_logging(debug)


@app.command()
def run(config: ConfigArg, sets: SetOption = None, run_name: RunOption = None,
        allow_mismatch: MismatchOption = False) -> None:
    """Build the dataset: the main job, start to end.

    Run the same command again after an interruption: it goes on where it stopped, and finished shards are not made
    again. A finished run says so. CONFIG may be the run.json of a run: the same plan again, id for id.
    """
    from flows.prepare import check, open_run
    from tasks.core.store import Store
    from tasks.pipeline import needs_servers

    resolved, origins = load_config(config, with_mismatch(sets, allow_mismatch), run_name)
    terminal.notice(f"checking {config}")
    plan = check(resolved, origins, recorded_run(config))
    if _is_finished(resolved, plan):
        return
    with Store(resolved.url).lock():  # said before anything is started; the flow takes it again
        opened = open_run(plan)
    terminal.notice(f"run {resolved.run}: {len(plan.prompts)} prompts x {len(plan.heuristics)} heuristics x "
                    f"{len(resolved.seeds)} seeds = {plan.requests} requests in {plan.shards} shards")
    from flows.prefect_server import prefect_api
    from flows.seats import state_dir
    from flows.servers import require_reachable

    if needs_servers(opened, deep=False):  # an early word; the flow reads the files
        require_reachable(resolved)
    with prefect_api(state_dir(resolved) / "prefect.log", terminal.notice, _debug):
        from flows import build

        build.notice, build.checked = terminal.notice, plan
        with _interruptible(resolved.url), terminal.watching(resolved.url):
            data = build.build_dataset(resolved, origins)
    _show_result(resolved.url, data)


def _is_finished(resolved: Any, plan: Any) -> bool:
    """Say so and where it lies, if nothing is left to do. Raises ThresholdError as the run itself did."""
    from flows.prepare import open_run
    from tasks.core.errors import ThresholdError
    from tasks.core.store import Store

    store = Store(resolved.url)
    if not store.exists("run.json") or not (store.read_json("run.json") or {}).get("finished"):
        return False
    with store.lock():
        ctx = open_run(plan)
    from tasks.pipeline import pending, reconsider

    if ctx.raw["finished"].get("problem") and (failed := reconsider(ctx)):
        terminal.notice(f"run {resolved.run} finished below a threshold: its {failed} failed candidates are asked for "
                        "again")
        return False
    if pending(ctx):
        return False
    terminal.notice(f"run {resolved.run} is finished already, on {ctx.raw['finished']['at']}: nothing to do")
    _show_result(resolved.url, store.read_json("report.json"))
    if problem := ctx.raw["finished"].get("problem"):
        raise ThresholdError(problem)
    return True


def _show_result(url: str, data: Any) -> None:
    from rich.markdown import Markdown

    from tasks.core.store import Store
    from tasks.publish.report import markdown

    terminal.out.print(Markdown(markdown(data)))
    store = Store(url)
    places = terminal.table(None, "", "")
    places.show_header = False
    if store.exists("dataset/README.md"):
        places.add_row("dataset", f"{store.display('dataset')}   datasets.load_dataset(\"{store.display('dataset')}\")")
    places.add_row("report", store.display("report.html"))
    places.add_row("every row", f"{store.display('candidates')}, verified, labels, comparisons, scores")
    terminal.out.print(places)


@contextmanager
def _interruptible(url: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM: what is in flight is cancelled and the run stays resumable; the second time, at once."""
    from tasks.context import interrupt

    seen = 0

    def stop(number: int, _frame: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            os._exit(130)
        terminal.notice("stopping; what was answered is kept, run the same command again to go on")
        interrupt(url)
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def plan(config: ConfigArg, sets: SetOption = None, run_name: RunOption = None) -> None:
    """Show what a run would do: prompts, heuristics, requests, shards, judge calls. Sends nothing."""
    from flows.prepare import check

    resolved, origins = load_config(config, sets, run_name)
    made = check(resolved, origins, recorded_run(config))
    counts = terminal.table(f"[bold]{resolved.run}[/bold]  ({resolved.url})", "", "", right=("",))
    counts.show_header = False
    for name, value in [
        ("prompts", len(made.prompts)), ("heuristics", len(made.heuristics)), ("seeds", len(resolved.seeds)),
        ("requests", made.requests), ("shards", made.shards), ("judge calls, at most", made.judge_calls()),
        ("new tokens, at most", made.requests * made.sampling.generation["generator"]["max_new_tokens"]),
    ]:
        counts.add_row(name, f"{value:,}")
    terminal.out.print(counts)
    sources = terminal.table("\n[bold]sources[/bold]", "source", "rows", "prompts", "copies folded", "malformed",
                             "verifier", right=("rows", "prompts", "copies folded", "malformed"))
    for source in resolved.sources:
        c = made.prompts.sources[source.name]
        sources.add_row(source.name, *(f"{n:,}" for n in (c.rows, c.prompts, c.copies, c.malformed_count)),
                        source.verifier or "none")
    terminal.out.print(sources)


@app.command(name="config")
def show_config(config: ConfigArg, sets: SetOption = None, run_name: RunOption = None) -> None:
    """Show the resolved config, each value with where it came from, and what every request will say."""
    from flows.prepare import resolve_sampling

    resolved, origins = load_config(config, sets, run_name)
    shown = terminal.table(None, "key", "value", "from", whole=("key", "from"))
    for key, value in flatten(resolved.model_dump(mode="json")).items():
        origin = origins[key]
        style = "dim" if origin == "default" else ""
        shown.add_row(escape(key), escape("null" if value is None else str(value)), escape(origin), style=style)
    terminal.out.print(shown)
    sampling = resolve_sampling(resolved, origins, recorded_run(config))
    sent = terminal.table("\n[bold]sent with every request[/bold]", "role", "field", "value", "from",
                          whole=("field", "from"))
    for role, found in sampling.generation.items():
        for name, v in found.values_from.items():
            style = "dim" if v.layer == "default" else ""
            sent.add_row(role, name, escape(str(v.value)), escape(v.origin), style=style)
    terminal.out.print(sent)
    terminal.out.print(_in_words(resolved, sampling), soft_wrap=True)


def _in_words(config: Any, sampling: Any) -> str:
    """Which heuristics take temperature and cuts from where, and what the prompts are rendered with."""
    model = sampling.inputs.model_defaults
    whose = f"{model.source}" if model else f"{config.model.path} has no generation_config.json"
    folded = sampling.named - len(sampling.heuristics)
    equal = f" ({folded} equal ones folded)" if folded else ""
    lines = [f"{len(sampling.heuristics)} heuristics{equal}: a heuristic's own temperature and cuts come before the "
             "generator's above, only --set before them",
             f"generation_config.json: {whose}"]
    for role, template in sampling.inputs.chat_templates.items():
        date = f", told the date {template.date}" if template.stamps_date else ""
        lines.append(f"{role}'s chat template: {template.digest} ({template.origin}{date})")
    lines += [f"note: {note}" for note in (model.notes if model else ())]
    return escape("\n".join(lines))


@app.command()
def heuristics(
    family: Annotated[str | None, typer.Argument(metavar="FAMILY", help="llama, qwen, gemma or generic.")] = None,
    files: Annotated[list[Path] | None, typer.Option("--file", help="A YAML file with sampling_pipelines.")] = None,
) -> None:
    """List the heuristics of a model family's grid, of files, or of both: unique and validated."""
    from tasks.core.heuristics import FAMILIES, expand, family_grid, read_file
    from tasks.serving.compile import compile_heuristic

    if family is None and not files:
        raise InputError(f"name a family ({', '.join(FAMILIES)}) or give --file")
    found = expand(family, files or [])
    given = (len(family_grid(family)) if family else 0) + sum(len(read_file(f)) for f in files or [])
    shown = terminal.table(None, "id", "name", "processors in order", "runs as", "also named")
    for h in found:
        path = "custom processor" if compile_heuristic(h, honours_seeds=False).custom_params is not None else "native"
        shown.add_row(h.id[:12], escape(h.name), h.describe(), path, escape(", ".join(h.aliases)))
    terminal.out.print(shown)
    folded = f"; {given - len(found)} equal ones folded" if given > len(found) else ""
    terminal.out.print(f"{len(found)} heuristics{folded}. Where a server honours seeds, every cut runs in the custom "
                       "processor.")


@app.command()
def status(run_name: RunArg, runs_dir: RunsDir = "data/runs") -> None:
    """Show how far a run is: stages, shards, rows, failures by kind, rates."""
    from flows import words
    from flows.status import answers_per_s, candidate_counts, defects, stage_statuses, worker

    ctx = open_run_named(run_name, runs_dir)
    finished = ctx.raw.get("finished")
    pid = worker(ctx)
    state = (f"process {pid} works on it" if pid else f"finished {finished['at']}" if finished
             else "not finished: run it again to go on")
    terminal.out.print(f"[bold]{escape(ctx.config.run)}[/bold]  {escape(ctx.url)}  ({state})")
    shown = terminal.table(None, "stage", "shards", "rows", "rows/s", right=("shards", "rows", "rows/s"))
    for s in stage_statuses(ctx):
        rate = f"{s.rows / s.seconds:.1f}" if s.seconds else "-"
        shown.add_row(s.name, f"{s.shards_done}/{s.shards}", f"{s.rows:,}", rate)
    terminal.out.print(shown)
    counts = candidate_counts(ctx)
    for name, n in counts.statuses.items():
        terminal.out.print(f"  {n:,} {name}")
    if counts.tokens_per_s:
        terminal.out.print(f"  {words.short(counts.tokens)} new tokens, {words.short(counts.tokens_per_s)} tok/s")
    if counts.journalled:
        now = answers_per_s(ctx)
        terminal.out.print(f"  {counts.journalled:,} answered, their shards not whole yet"
                           + (f"; now {words.per_second(now)}" if now else ""))
    kinds, cells = defects(ctx)
    if kinds:
        terminal.out.print(f"defects: {words.failures(kinds)}")
        for cell in cells[:5]:
            terminal.out.print(escape(f"  {cell['defect']}: prompt {cell['prompt_id'][:12]}, {cell['heuristic']}, "
                                      f"seed {cell['seed']}"))
    if finished and finished.get("problem"):
        terminal.out.print(f"[yellow]{escape(finished['problem'])}[/yellow]")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with the contract's code."""
    code = _exit_code(lambda: app(arguments, standalone_mode=False))
    if arguments is None:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process, without taking the interpreter apart.

    Threads of native libraries live on while that is done, and have crashed finished runs: a signal's number in place
    of the exit code.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except WinnowError as error:
        if _debug:
            terminal.console.print_exception()
        style, word = ("yellow", "below a threshold") if error.exit_code == 3 else ("red", "error")
        terminal.console.print(f"[{style}]{word}:[/{style}] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort, InterruptedRun):
        terminal.console.print("interrupted; run the same command again to go on")
        return 130
    except _USAGE_ERROR as error:
        error.show()
        return error.exit_code
    except Exception as error:
        if _debug:
            terminal.console.print_exception()
        else:
            terminal.console.print(f"[red]unexpected error:[/red] {escape(f'{type(error).__name__}: {error}')}\n"
                                   "Run with `winnow --debug ...` for the traceback.", soft_wrap=True)
        return 1


if __name__ == "__main__":
    main()
