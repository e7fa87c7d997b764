"""kill -9 and full disks at chosen moments: nothing is lost, and no more is repeated than was in flight."""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.context import Context
from tests.fake_sglang import FakeSGLang
from tests.generation.nursery import Nursery
from tests.runs import make_config

pytestmark = pytest.mark.slow

VOLATILE = ("latency_s", "attempts", "server")
IN_FLIGHT = 3


@pytest.fixture(scope="module")
def nursery(tiny_model) -> Iterator[Nursery]:
    with Nursery(tiny_model) as nursery:
        yield nursery


def rows(raw: dict[str, Any]) -> dict[str, list[dict]]:
    """Every file of candidates/ and verified/, row for row, without what differs from run to run."""
    store = Context(f"{raw['runs_dir']}/test").store
    found = store.glob("candidates/*/*.parquet") + store.glob("verified/*.parquet")
    return {path: store.read(path).drop_columns(list(VOLATILE)).to_pylist() for path in found}


def leftovers(raw: dict[str, Any]) -> list[str]:
    """Journals and half-written files."""
    folder = Path(raw["runs_dir"]) / "test"
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix in (".jsonl", ".winnow-tmp")]


class Faulty:
    """One cell in five fails at its first attempt, one in ten always; with one attempt, the rest is repair's to mend."""

    def __init__(self) -> None:
        self.sent: collections.Counter[str] = collections.Counter()

    def __call__(self, _: int, payload: dict[str, Any]) -> str | None:
        rid = payload["rid"]
        self.sent[rid] += 1
        kind = payload["sampling_params"]["sampling_seed"] % 10
        return "500" if kind == 0 or (kind in (1, 2) and self.sent[rid] == 1) else None


def config(folder: Path, model: Path, server: FakeSGLang, **changes: Any) -> dict[str, Any]:
    raw = make_config(folder, model, [server.url], **{"limits": {"attempts": 1, "wait_for_servers_s": 5}} | changes)
    raw["servers"]["generator"][0]["max_in_flight"] = IN_FLIGHT
    return raw


@pytest.fixture(scope="module")
def undisturbed(nursery, tiny_model, tmp_path_factory) -> tuple[dict[str, list[dict]], int, list[str]]:
    """(rows, requests sent, changes of the file system) of the faulty run when nobody kills it."""
    with FakeSGLang(fault=(faulty := Faulty())) as server:
        raw = config(tmp_path_factory.mktemp("calm"), tiny_model, server)
        ended = nursery.run(raw)
    assert ended.code == 0, ended.said
    found = rows(raw)
    statuses = collections.Counter(r["status"] for path, rows in found.items() for r in rows if path.startswith("v"))
    assert statuses["server_error"] > 0
    assert statuses["ok"] + statuses["server_error"] == 40
    assert leftovers(raw) == []
    return found, faulty.sent.total(), ended.changes


@pytest.mark.parametrize("seed", range(3))
def test_killed_before_changes_of_the_file_system_a_run_goes_on_as_if_nothing_was(
        nursery, undisturbed, tiny_model, tmp_path, seed):
    wanted, sent, changes = undisturbed
    rng, places = random.Random(seed), []
    with FakeSGLang(fault=(faulty := Faulty())) as server:
        raw = config(tmp_path, tiny_model, server)
        while len(places) < 6:
            ended = nursery.run(raw, kill_at=rng.randint(1, len(changes) // 3))
            if ended.code == 0:
                break
            assert ended.code == -9, ended.said
            places.append(ended.changes[-1])
        assert nursery.run(raw).code == 0
    assert rows(raw) == wanted, places
    assert leftovers(raw) == [], places
    in_flight = IN_FLIGHT * sum(map(busy, places))
    assert sent <= faulty.sent.total() <= sent + in_flight, places
    assert sum(max(0, n - 1) for n in server.answered.values()) <= in_flight, places


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_number_of_requests_a_run_repeats_what_was_in_flight_at_most(
        nursery, undisturbed, tiny_model, tmp_path, seed):
    wanted, sent, _ = undisturbed
    rng, kills = random.Random(seed), 0
    with FakeSGLang(fault=(faulty := Faulty()), delay_s=0.01) as server:
        raw = config(tmp_path, tiny_model, server)
        for _ in range(5):
            child, until = nursery.begin(raw), faulty.sent.total() + rng.randint(1, sent // 4)
            while child.runs and faulty.sent.total() < until:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            if child.runs:
                child.kill()
                kills += 1
            child.wait()
        assert nursery.run(raw).code == 0
    assert kills >= 3
    assert rows(raw) == wanted
    assert leftovers(raw) == []
    assert faulty.sent.total() <= sent + kills * IN_FLIGHT
    assert sum(max(0, n - 1) for n in server.answered.values()) <= kills * IN_FLIGHT


def busy(place: str) -> bool:
    """Whether requests are in flight then: a journal is made when the first answer comes, files change when all are
    there."""
    return "/journal" in place and not place.startswith("os.remove")


@pytest.mark.parametrize("part", ["/candidates/", "/journal/repair/", "/verified/", "/manifests/", "prompts", "run.json"])
def test_killed_while_it_writes_files_a_run_repeats_nothing(nursery, undisturbed, tiny_model, tmp_path, part):
    wanted, sent, changes = undisturbed
    moments = [n for n, place in enumerate(changes, 1) if part in place and not busy(place)]
    for n, kill_at in enumerate(random.Random(0).sample(moments, min(3, len(moments)))):
        with FakeSGLang(fault=(faulty := Faulty())) as server:
            raw = config(tmp_path / str(n), tiny_model, server)
            ended = nursery.run(raw, kill_at=kill_at)
            assert ended.code == -9
            place = ended.changes[-1]
            ended = nursery.run(raw)
            assert ended.code == 0, ended.said
        assert rows(raw) == wanted, place
        assert leftovers(raw) == ([place.partition("/test/")[2]] if place.startswith("os.remove /test/journal/repair")
                                  else []), place  # the very last moment leaves an empty shell, which does no harm
        if not busy(place):
            assert faulty.sent.total() == sent, place


# --- no room ---


def out_of_room(nursery: Nursery, raw: dict[str, Any], where: str, most: int) -> str:
    """Build on a disk that is full from the first change at `where` on; what the error says."""
    ended = nursery.run(raw, room=(where, most))
    folder = Path(raw["runs_dir"]) / "test"
    assert ended.code == 130, ended.said
    assert str(folder) in ended.said
    assert "make room and run the same command again" in ended.said
    assert not list(folder.rglob("*.winnow-tmp"))
    return ended.said


def test_a_disk_that_fills_while_answers_come_costs_what_was_in_flight_at_most(
        nursery, undisturbed, tiny_model, tmp_path):
    wanted, sent, _ = undisturbed
    with FakeSGLang(fault=(faulty := Faulty())) as server:
        raw = config(tmp_path, tiny_model, server)
        most = (0, 5000, 5001, 12_000)
        for room in most:
            said = out_of_room(nursery, raw, "/journal/candidates/shard-0000", room)
            assert "/journal/candidates/shard-0000.jsonl" in said
        assert len(server.answered) > 5
        ended = nursery.run(raw)
        assert ended.code == 0, ended.said
    assert rows(raw) == wanted
    assert leftovers(raw) == []
    # answers that found no room were in flight until then
    assert faulty.sent.total() <= sent + len(most) * IN_FLIGHT
    assert sum(max(0, n - 1) for n in server.answered.values()) <= len(most) * IN_FLIGHT


@pytest.mark.parametrize("where", ["/test/candidates/seed=0/", "/test/candidates/seed=1/", "/manifests/candidates/",
                                   "/test/verified/", "/manifests/verified/"])
def test_a_disk_that_fills_while_a_file_is_written_costs_nothing(nursery, undisturbed, tiny_model, tmp_path, where):
    wanted, sent, _ = undisturbed
    with FakeSGLang(fault=(faulty := Faulty())) as server:
        raw = config(tmp_path, tiny_model, server)
        for most in (0, 100):
            out_of_room(nursery, raw, where, most)
        ended = nursery.run(raw)
        assert ended.code == 0, ended.said
    assert rows(raw) == wanted
    assert leftovers(raw) == []
    assert faulty.sent.total() == sent
