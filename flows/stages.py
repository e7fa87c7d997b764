"""One Prefect task per shard and stage, a sliding window of them, progress in the UI."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture, wait

from tasks.context import context
from tasks.core.errors import WinnowError
from tasks.pipeline import stage
from tasks.stage import ensure

log = logging.getLogger("winnow.stages")

_UI_EVERY_S = 5.0


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
def run_shard(url: str, stage_name: str, shard: int) -> str:
    """One stage of one shard of the run at `url`; `made` or `reused`."""
    ctx = context(url)
    began = time.monotonic()
    how = ensure(stage(stage_name), ctx, shard)
    log.info("%s shard %d: %s in %.1f s", stage_name, shard, how, time.monotonic() - began)
    return how


def run_stages(url: str, names: list[list[str]], window: int) -> None:
    """Run stages over all shards: `names` holds chains, in which a stage of a shard follows the one before.

    At most `window` tasks wait or run. The first failure stops the submitting and is raised once what
    runs has ended.
    """
    ctx = context(url)
    for name in (name for chain in names for name in chain):
        known = stage(name)
        ctx.progress.begin(name, known.unit, sum(known.size(ctx, n) for n in range(ctx.shards)))
    wanted = ((chain, shard) for shard in range(ctx.shards) for chain in names)
    pending: dict[PrefectFuture[Any], tuple[list[str], int]] = {}
    artifact = _ProgressArtifact(url, [n for chain in names for n in chain])
    failure: BaseException | None = None
    exhausted = False
    while pending or not (exhausted or failure):
        while len(pending) < window and not exhausted and not failure:
            following = next(wanted, None)
            if following is None:
                exhausted = True
                break
            chain, shard = following
            pending[run_shard.submit(url, chain[0], shard)] = (chain, shard)
        if not pending:
            break
        done, _ = wait(list(pending), timeout=1)
        for future in done:
            chain, shard = pending.pop(future)
            try:
                future.result()
            except Exception as error:
                failure = failure or error
                continue
            if len(chain) > 1 and not failure:
                pending[run_shard.submit(url, chain[1], shard)] = (chain[1:], shard)
        artifact.update()
    artifact.update(last=True)
    if failure:
        raise failure


def artifact_key(*parts: str) -> str:
    """The parts as Prefect wants an artifact's key: lower case, digits and dashes."""
    return "".join(c if c.isalnum() else "-" for c in "-".join(parts).lower())


class _ProgressArtifact:
    """The stages' progress as a bar in the UI, refreshed every few seconds."""

    def __init__(self, url: str, names: Iterable[str]) -> None:
        self._ctx, self._names, self._next = context(url), set(names), 0.0
        self._id: Any = None
        self._key = artifact_key(self._ctx.config.run, *sorted(self._names))

    def update(self, last: bool = False) -> None:
        """Create or refresh the bar, not more often than every few seconds."""
        if not last and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _UI_EVERY_S
        stages = [s for s in self._ctx.progress.snapshot() if s.name in self._names]
        total = sum(s.total for s in stages)
        share = 100.0 * sum(s.done for s in stages) / total if total else 0.0
        text = "; ".join(f"{s.name}: {s.done} of {s.total} {s.unit}, {s.rate:.1f}/s" for s in stages)
        _quietly(lambda: self._write(share, text or "starting"))

    def _write(self, share: float, text: str) -> None:
        if self._id is None:
            self._id = create_progress_artifact(progress=share, key=self._key, description=text)
        else:
            update_progress_artifact(artifact_id=self._id, progress=share, description=text)


def _quietly(write: Callable[[], None]) -> None:
    """A UI that can't be written to must not stop the run."""
    try:
        write()
    except Exception as error:
        log.debug("progress artifact: %s", error)
