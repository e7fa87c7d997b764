from __future__ import annotations

import collections
import math

import choix
import numpy as np
import pytest

from tasks.labels.quality.judge import Verdict
from tasks.labels.quality.labeller import comparison, planned_calls, players_of, rate, transcript
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

JUDGED = ["generate", "verify", "quality"]


def tables(ctx, name: str) -> list[dict]:
    return [r for n in range(ctx.shards) for r in ctx.store.read(f"{name}/shard-{n:04d}.parquet").to_pylist()]


def test_every_pair_is_shown_in_both_orders_and_the_plan_counts_the_calls(tmp_path, tiny_model):
    with FakeSGLang() as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), JUDGED)
        comparisons, calls = tables(ctx, "comparisons"), server.judgements
    assert len(calls) == 2 * len(comparisons) == 5 * 2 * planned_calls(4, 1)
    assert all(c["token_ids_logprob"] == [ord("A"), ord("B")] for c in calls)
    assert all(c["sampling_params"]["max_new_tokens"] == 1 for c in calls)
    assert len({tuple(c["input_ids"]) for c in calls}) == len(calls)
    for row in comparisons:
        assert row["outcome"] == pytest.approx((row["p_first"] + row["p_second"]) / 2)
        assert row["outside"] == pytest.approx(0.02)
    groups = collections.Counter((r["prompt_id"], r["seed"]) for r in comparisons)
    assert set(groups.values()) == {6}  # four players, three rounds: each met each
    ratings = {r["candidate_id"]: r for r in tables(ctx, "labels/quality")}
    assert len(ratings) == 40
    assert all(r["rating_se"] > 0 and r["comparisons"] == 3 for r in ratings.values())


def test_ratings_are_the_maximum_likelihood_of_the_stored_comparisons(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], quality={"max_prompt_tokens": 1600, "prior_sd": 1e5})
        ctx = build(raw, JUDGED)
    ratings = {r["candidate_id"]: r["rating"] for r in tables(ctx, "labels/quality")}
    rows = tables(ctx, "comparisons")
    for group in {(r["prompt_id"], r["seed"]) for r in rows}:
        own = [r for r in rows if (r["prompt_id"], r["seed"]) == group]
        players = sorted({r["a"] for r in own} | {r["b"] for r in own})
        wins = np.zeros((len(players), len(players)))
        for r in own:
            a, b = players.index(r["a"]), players.index(r["b"])
            wins[a, b] += r["outcome"]
            wins[b, a] += 1 - r["outcome"]
        expected = choix.ilsr_pairwise_dense(wins, alpha=0, tol=1e-12)
        assert [ratings[p] for p in players] == pytest.approx(list(expected - expected.mean()), abs=1e-5)


def test_a_failed_judgement_is_an_abstention_with_a_reason(tmp_path, tiny_model):
    def fault(n: int, payload: dict) -> str | None:
        return "400" if "token_ids_logprob" in payload and sum(payload["input_ids"]) % 3 == 0 else None

    with FakeSGLang(fault=fault) as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), JUDGED)
    rows = tables(ctx, "comparisons")
    abstained = [r for r in rows if r["outcome"] is None]
    assert 0 < len(abstained) < len(rows)
    for row in rows:
        assert (row["outcome"] is None) == (row["p_first"] is None or row["p_second"] is None)
        assert (row["outcome"] is None) == (row["reason"] is not None)
    assert all(r["reason"].startswith("rejected") for r in abstained)


def test_without_any_judgement_ratings_are_null(tmp_path, tiny_model):
    with FakeSGLang(fault=lambda n, p: "400" if "token_ids_logprob" in p else None) as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), JUDGED)
    assert {(r["rating"], r["rating_se"], r["comparisons"]) for r in tables(ctx, "labels/quality")} == {(None, None, 0)}


def test_a_restart_asks_no_judgement_twice(tmp_path, tiny_model):
    from tasks.core.errors import UnreachableError

    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], limits={"wait_for_servers_s": 0.3})
        build(raw, ["generate", "verify"])
        server.fault = lambda n, p: server.crash() if n == 80 else None  # type: ignore[assignment]
        with pytest.raises(UnreachableError):
            build(raw, JUDGED)
        first = len(server.judgements)
    with FakeSGLang() as server:
        raw["servers"] = {"generator": [{"url": server.url, "max_in_flight": 8}]}
        build(raw, JUDGED)
        assert first + len(server.judgements) - 120 <= 8  # at most what was in flight


def row(name: str, text: str) -> dict:
    return {"candidate_id": name, "text": text}


def test_equal_texts_share_one_player_and_its_rating():
    rows = [row("c", "same"), row("a", "same"), row("b", "other")]
    assert players_of(rows) == {"same": "a", "other": "b"}
    out = {r["candidate_id"]: r for r in rate(rows, [{"a": "a", "b": "b", "outcome": 0.8}], 3.0)}
    assert out["a"] == out["c"] | {"candidate_id": "a"}
    assert out["a"]["rating"] == pytest.approx(-out["b"]["rating"])
    assert out["a"]["rating"] > 0
    assert (out["c"]["player"], out["c"]["comparisons"]) == ("a", 1)


def test_ratings_that_comparisons_do_not_settle_are_flagged():
    rows = [row(c, c) for c in "abcd"]

    def flags(*played: tuple[str, str, float]) -> str | None:
        return rate(rows, [{"a": a, "b": b, "outcome": o} for a, b, o in played], 2.5)[0]["rating_flags"]

    assert flags(("a", "b", 0.6), ("c", "d", 0.6)) == "disconnected"
    assert flags(("a", "b", 1.0), ("b", "c", 0.5), ("c", "d", 0.5)) == "separated"
    assert flags(("a", "b", 0.6), ("b", "c", 0.5), ("c", "d", 0.5)) is None


def test_a_judge_that_always_prefers_the_first_shown_calls_a_draw():
    made = comparison("a", "b", Verdict(0.9, 0.0, None), Verdict(0.9, 0.1, None))
    assert (made["p_first"], made["p_second"]) == (0.9, pytest.approx(0.1))
    assert made["outcome"] == pytest.approx(0.5)
    assert made["outside"] == pytest.approx(0.05)


def test_one_failed_order_is_an_abstention():
    made = comparison("a", "b", Verdict(0.9, 0.0, None), Verdict(None, None, "timeout: x"))
    assert (made["p_first"], made["p_second"], made["outcome"], made["reason"]) == (0.9, None, None, "timeout: x")


def test_planned_calls_of_the_full_grid():
    assert planned_calls(1, 1) == 0
    assert planned_calls(8, 1) == (math.ceil(math.log2(8)) + 1) * 4 * 2
    assert planned_calls(396, 1) == 10 * 198 * 2


def test_the_judge_sees_the_whole_exchange_without_the_system_message():
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    assert transcript([system, user]) == "u"
    assert transcript([user, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]) == (
        "User: u\nAssistant: a\nUser: v")
