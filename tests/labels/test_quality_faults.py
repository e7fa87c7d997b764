"""Labelling that is killed, finds no room, loses its cache, or has judges that break: it ends with the labels of a
calm run, and asks no judgement twice but those in flight."""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.context import Context
from tests.fake_sglang import FakeSGLang
from tests.generation.nursery import Nursery
from tests.runs import build, make_config

pytestmark = pytest.mark.slow

JUDGED = ["generate", "verify", "quality"]
IN_FLIGHT, BATCH = 4, 8


def config(folder: Path, model: Path, server: FakeSGLang, **changes: Any) -> dict[str, Any]:
    raw = make_config(folder, model, [server.url], **changes)
    raw["servers"]["generator"][0]["max_in_flight"] = IN_FLIGHT
    return raw


def labels(raw: dict[str, Any]) -> dict[str, list[dict]]:
    """Comparisons and labels, row for row."""
    store = Context(f"{raw['runs_dir']}/test").store
    return {path: store.read(path).to_pylist() for path in store.glob("comparisons/*") + store.glob("labels/*/*")}


def facts(raw: dict[str, Any]) -> tuple[int, int]:
    """(judge calls, verdicts of other runs), over all shards."""
    store = Context(f"{raw['runs_dir']}/test").store
    found = [m.facts for path in store.glob("labels/quality/*") if (m := store.manifest(path))]
    return sum(f["calls"] for f in found), sum(f["spared"] for f in found)


def leftovers(raw: dict[str, Any]) -> list[Path]:
    folder = Path(raw["runs_dir"]) / "test"
    return [p for p in folder.rglob("*") if p.is_file() and ("journal" in p.parts or p.suffix == ".winnow-tmp")]


def questions(*servers: FakeSGLang) -> collections.Counter[tuple[int, ...]]:
    return collections.Counter(tuple(one["input_ids"]) for server in servers for one in server.judgements)


@pytest.fixture(scope="module")
def nursery(tiny_model):
    with Nursery(tiny_model) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def calm(tiny_model, tmp_path_factory) -> tuple[dict[str, list[dict]], int]:
    """(labels, judgements asked for) when nothing happens."""
    with FakeSGLang() as server:
        raw = config(tmp_path_factory.mktemp("calm"), tiny_model, server)
        build(raw, JUDGED)
    assert facts(raw) == (len(server.judgements), 0)
    return labels(raw), len(server.judgements)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_killed_at_any_judgement_a_run_goes_on_as_if_nothing_was(nursery, calm, tiny_model, tmp_path, cache):
    wanted, asked = calm
    rng, kills, most = random.Random(cache), 0, IN_FLIGHT * BATCH
    with FakeSGLang(delay_s=0.005) as server:
        quality = {"max_prompt_tokens": 1600} | ({"cache": "off"} if cache == "off" else {})
        raw = config(tmp_path, tiny_model, server, quality=quality)
        build(raw, ["generate", "verify"])
        # the first late: there is more to lose than what is in flight
        for span in [(asked // 2, 2 * asked // 3), (1, asked // 6)][: 2 if cache == "on" else 1]:
            child, until = nursery.begin(raw, stages=JUDGED), len(server.judgements) + rng.randint(*span)
            while child.runs and len(server.judgements) < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            if child.runs:
                child.kill()
                kills += 1
            child.wait()
        ended = nursery.begin(raw, stages=JUDGED).wait()
        assert ended.code == 0, ended.said
    assert kills >= 1
    assert labels(raw) == wanted
    assert facts(raw) == (asked, 0)
    assert len(questions(server)) == asked
    assert len(server.judgements) <= asked + kills * most
    assert leftovers(raw) == []


def test_a_disk_that_fills_while_verdicts_come_costs_what_was_in_flight(nursery, calm, tiny_model, tmp_path):
    wanted, asked = calm
    with FakeSGLang() as server:
        raw = config(tmp_path, tiny_model, server)
        build(raw, ["generate", "verify"])
        ended = nursery.begin(raw, room=("/.judgements", 40_000), stages=JUDGED).wait()
        assert ended.code == 130, ended.said
        assert "judgements-1.sqlite: cannot be written" in ended.said
        assert 0 < len(server.judgements) < asked
        ended = nursery.begin(raw, stages=JUDGED).wait()
        assert ended.code == 0, ended.said
    assert labels(raw) == wanted
    assert facts(raw) == (asked, 0)
    assert len(server.judgements) <= asked + IN_FLIGHT * BATCH


def _delete(file: Path) -> None:
    for name in file.parent.glob("judgements*"):
        name.unlink()


def _replace(file: Path) -> None:
    file.with_name("new").write_bytes(b"no database" * 900)
    file.with_name("new").rename(file)


def at(number: int, act: Callable[[], object]) -> Callable[[int, dict[str, Any]], None]:
    """A fault that does something when a judgement of that number is asked for, and lets it pass."""
    count = iter(range(1, 10**9))

    def fault(_: int, payload: dict[str, Any]) -> None:
        if "token_ids_logprob" in payload and next(count) == number:
            act()

    return fault


@pytest.mark.parametrize("act", [_delete, _replace])
def test_a_cache_that_is_lost_while_a_run_works_changes_no_label(calm, tiny_model, tmp_path, act):
    wanted, asked = calm
    with FakeSGLang() as server:
        raw = config(tmp_path, tiny_model, server)
        kept = Path(raw["runs_dir"]) / ".judgements" / "judgements-1.sqlite"
        server.fault = at(asked // 2, lambda: act(kept))
        build(raw, JUDGED)
    assert labels(raw) == wanted
    assert len(server.judgements) == asked


class Spoiling(FakeSGLang):
    """A judge whose verdicts are of a wrong kind."""

    spoil: Callable[[dict[str, Any], int, int], object]

    def judge(self, payload: dict[str, Any]) -> dict[str, Any]:
        answer = super().judge(payload)
        self.spoil(answer["meta_info"], *payload["token_ids_logprob"])
        return answer


@pytest.mark.parametrize("verdict", [
    lambda a, b: [[[0.5, a, None], [-1.0, b, None]]], lambda a, b: [[[None, a, None], [-1.0, b, None]]],
    lambda a, b: [[["-1", a, None], ["-2", b, None]]], lambda a, b: [[[-1.0, a, None]]], lambda a, b: [], lambda a, b: None,
    lambda a, b: [[[-1.0, [a], None]]], lambda a, b: "no list",
], ids=["positive", "null", "text", "one", "none", "missing", "nested", "foreign"])
def test_a_verdict_that_is_none_is_an_abstention(tiny_model, tmp_path, verdict):
    server = Spoiling()
    server.spoil = lambda meta, a, b: meta.update(output_token_ids_logprobs=verdict(a, b))
    with server:
        raw = config(tmp_path, tiny_model, server, seeds=[0], engine={"shard_prompts": 8})
        build(raw, JUDGED)
    found = labels(raw)
    compared = [row for path, rows in found.items() if path.startswith("comparisons") for row in rows]
    rated = [row for path, rows in found.items() if path.startswith("labels") for row in rows]
    assert {(row["outcome"], row["reason"].partition(":")[0]) for row in compared} == {(None, "no_verdict")}
    assert {row["rating"] for row in rated} == {None}
    assert len(server.judgements) == 2 * len(compared)


@pytest.mark.parametrize("change", [lambda judge: judge.crash(), lambda judge: judge.restart(model_path="another")],
                         ids=["crashes", "restarts as another model"])
def test_a_judge_that_is_gone_for_a_while_or_for_good_changes_no_label(calm, tiny_model, tmp_path, change):
    wanted, asked = calm
    with FakeSGLang() as server, FakeSGLang(delay_s=0.01) as first, FakeSGLang(delay_s=0.01) as second:
        raw = config(tmp_path, tiny_model, server)
        raw["servers"]["judge"] = [{"url": judge.url, "max_in_flight": IN_FLIGHT} for judge in (first, second)]
        first.fault = at(20, lambda: change(first))
        build(raw, JUDGED)
    assert labels(raw) == wanted
    assert facts(raw) == (asked, 0)
    assert len(questions(first, second)) == asked
    assert questions(first, second).total() <= asked + IN_FLIGHT * BATCH
