"""One Prefect task per shard and stage, a sliding window of them, a line in the log for each."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.futures import PrefectFuture, wait

from flows import words
from flows.artifacts import Shown
from flows.status import answered
from tasks.context import Context, context
from tasks.core.errors import WinnowError
from tasks.generation.candidates import Candidates
from tasks.pipeline import stage
from tasks.stage import Stage, ensure

log = logging.getLogger("winnow.stages")
if not log.isEnabledFor(logging.INFO):
    log.setLevel(logging.INFO)  # in a worker process nobody has set up logging, and the UI wants its lines

_MANY_SHARDS, _QUICK_S, _LONG_S = 50, 1.0, 5.0


@dataclass(frozen=True)
class ShardDone:
    """How one stage of one shard ended."""

    stage: str
    shard: int
    how: str
    """`made` or `reused`."""
    units: int
    stood: int
    """Of `units`, what an earlier process had answered."""
    failures: dict[str, int]
    tokens: int
    seconds: float
    counted: bool
    """Whether the progress that people watch was advanced; a worker in another process has none."""

    def line(self, unit: str) -> str:
        """For the log."""
        title = words.TITLES.get(self.stage, self.stage)
        if self.how == "reused":
            return f"{title} shard {self.shard:04d}: {self.units:,} {unit} stood already"
        made = self.units - self.stood
        # the manifest's tokens are those of all rows: with some from before there is no telling how fast ours came
        return words.shard_line(title, self.shard, f"{self.units:,} {unit}", self.stood, self.failures,
                                self.seconds, made / max(self.seconds, 1e-3),
                                0.0 if self.stood else self.tokens / max(self.seconds, 1e-3))

    def is_shown(self, shards: int) -> bool:
        """Whether the line is worth a place in the terminal."""
        if self.how == "reused":
            return False
        if self.stage == Candidates.name:
            return self.seconds >= _QUICK_S or shards <= _MANY_SHARDS
        return self.seconds >= _LONG_S


def _worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """What we can explain (no server, wrong input, interrupted) is not mended by another try."""
    try:
        state.result()
    except WinnowError:
        return False
    except Exception:
        return True
    return False


@task(name="shard", task_run_name="{stage_name}-{shard:04d}", retries=2, retry_delay_seconds=[5, 30],
      retry_condition_fn=_worth_retrying, persist_result=False)
def run_shard(url: str, stage_name: str, shard: int) -> ShardDone:
    """One stage of one shard of the run at `url`."""
    ctx = context(url)
    made = stage(stage_name)
    stood = answered(ctx, shard) if stage_name == Candidates.name else 0
    began = time.monotonic()
    how = ensure(made, ctx, shard)
    done = _done(ctx, made, shard, how, stood, time.monotonic() - began)
    log.info("%s", done.line(made.unit), extra={"shown": done.counted and done.is_shown(ctx.shards)})
    return done


def _done(ctx: Context, made: Stage, shard: int, how: str, stood: int, seconds: float) -> ShardDone:
    """The facts, from the manifests of the shard's files."""
    failures: dict[str, int] = {}
    tokens = 0
    for path in made.outputs(ctx, shard):
        manifest = ctx.store.manifest(path)
        facts = manifest.facts if manifest else {}
        for kind, n in (facts.get("statuses") or facts.get("defects") or {}).items():
            if kind != "ok":
                failures[kind] = failures.get(kind, 0) + n
        tokens += facts.get("tokens") or 0
    units = made.size(ctx, shard)
    return ShardDone(made.name, shard, how, units, units if how == "reused" else min(stood, units), failures,
                     tokens if made.name == Candidates.name else 0, seconds, made.name in ctx.progress)


def _count(ctx: Context, done: ShardDone, unit: str, planned: int) -> None:
    """Progress of a shard that a worker process made: it counts when it is whole."""
    if done.counted:
        return
    ctx.progress.spare(done.stage, planned - done.units)
    ctx.progress.advance(done.stage, done.stood, already=True)
    made = done.units - done.stood
    for kind, n in done.failures.items():
        if made >= n:
            ctx.progress.advance(done.stage, n, failure=kind)
            made -= n
    ctx.progress.advance(done.stage, made, tokens=0 if done.stood else done.tokens)
    log.info("%s", done.line(unit), extra={"shown": done.is_shown(ctx.shards), "send_to_api": False})


def run_stages(url: str, names: list[list[str]], window: int) -> None:
    """Run stages over all shards: `names` holds chains, in which a stage of a shard follows the one before.

    At most `window` tasks wait or run. The first failure stops the submitting and is raised once what
    runs has ended.
    """
    ctx = context(url)
    planned: dict[tuple[str, int], int] = {}
    for name in (name for chain in names for name in chain):
        known = stage(name)
        planned |= {(name, n): known.size(ctx, n) for n in range(ctx.shards)}
        ctx.progress.begin(name, known.unit, sum(planned[name, n] for n in range(ctx.shards)))
    wanted = ((chain, shard) for shard in range(ctx.shards) for chain in names)
    pending: dict[PrefectFuture[Any], tuple[list[str], int]] = {}
    shown = Shown(ctx, [n for chain in names for n in chain])
    failure: BaseException | None = None
    exhausted = False
    ended = threading.Event()

    def submit(chain: list[str], shard: int) -> None:
        future = run_shard.submit(url, chain[0], shard)
        future.add_done_callback(lambda _: ended.set())
        pending[future] = (chain, shard)

    while pending or not (exhausted or failure):
        while len(pending) < window and not exhausted and not failure:
            following = next(wanted, None)
            if following is None:
                exhausted = True
                break
            chain, shard = following
            submit(chain, shard)
        if not pending:
            break
        ended.wait(1)  # `wait` alone returns when all have ended, or after its timeout
        ended.clear()
        done, _ = wait(list(pending), timeout=0.01)
        for future in done:
            chain, shard = pending.pop(future)
            try:
                _count(ctx, future.result(), stage(chain[0]).unit, planned[chain[0], shard])
            except Exception as error:
                failure = failure or error
                continue
            if len(chain) > 1 and not failure:
                submit(chain[1:], shard)
        shown.update()
    shown.update(last=True)
    if failure:
        raise failure
