from __future__ import annotations

import collections
import math

import choix
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.core.config import RunConfig
from tasks.labels.quality.asking import Answer
from tasks.labels.quality.labeller import calls_of, transcript
from tasks.labels.quality.tournament import comparison, players_of, pooled, rate
from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

JUDGED = ["generate", "verify", "quality"]


def tables(ctx, name: str) -> list[dict]:
    return [r for n in range(ctx.shards) for r in ctx.store.read(f"{name}/shard-{n:04d}.parquet").to_pylist()]


def test_every_pair_is_shown_in_both_orders_and_the_plan_counts_the_calls(tmp_path, tiny_model):
    with FakeSGLang() as server:
        ctx = build(make_config(tmp_path, tiny_model, [server.url]), JUDGED)
        comparisons, calls = tables(ctx, "comparisons"), server.judgements
    assert len(calls) == 2 * len(comparisons) == 5 * 2 * calls_of(4, ctx.config)
    assert all(c["token_ids_logprob"] == [ord("A"), ord("B")] for c in calls)
    assert all(c["sampling_params"]["max_new_tokens"] == 1 for c in calls)
    assert len({tuple(c["input_ids"]) for c in calls}) == len(calls)
    for row in comparisons:
        odds = [math.log(p / (1 - p)) for p in (row["p_first"], row["p_second"])]
        assert row["outcome"] == pytest.approx(1 / (1 + math.exp(-sum(odds) / 2)))
        assert row["outside"] == pytest.approx(0.02)
    groups = collections.Counter((r["prompt_id"], r["seed"]) for r in comparisons)
    assert set(groups.values()) == {6}  # four players, three rounds: each met each
    ratings = {r["candidate_id"]: r for r in tables(ctx, "labels/quality")}
    assert len(ratings) == 40
    assert all(r["rating_se"] > 0 and r["comparisons"] == 3 for r in ratings.values())


def test_ratings_are_the_maximum_likelihood_of_the_stored_comparisons(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], quality={"max_prompt_tokens": 1600, "prior_sd": 1000})
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
    rows = tables(ctx, "labels/quality")
    assert {(r["rating"], r["rating_se"], r["comparisons"], r["reliability"], r["dispersion"]) for r in rows} == {
        (None, None, 0, None, None)}
    assert not any(r["settled"] for r in rows)


def test_a_restart_asks_no_judgement_twice(tmp_path, tiny_model):
    from tasks.core.errors import UnreachableError

    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], limits={"wait_for_servers_s": 0.3})
        raw["servers"] = {"generator": [{"url": server.url, "max_in_flight": 2}]}
        build(raw, ["generate", "verify"])
        server.fault = lambda n, p: server.crash() if n == 60 else None  # type: ignore[assignment]
        with pytest.raises(UnreachableError):
            build(raw, JUDGED)
        first = len(server.judgements)
    with FakeSGLang() as server:
        raw["servers"] = {"generator": [{"url": server.url, "max_in_flight": 2}]}
        build(raw, JUDGED)
        assert first + len(server.judgements) - 120 <= 2 * 4  # at most what was in flight: a group's round a request


def row(name: str, text: str) -> dict:
    return {"candidate_id": name, "text": text}


def test_equal_texts_share_one_player_and_its_rating():
    rows = [row("c", "same"), row("a", "same"), row("b", "other")]
    assert players_of(rows) == {"same": "a", "other": "b"}
    out = {r["candidate_id"]: r for r in rate(rows, [{"a": "a", "b": "b", "outcome": 0.8}], config_of(prior_sd=3.0), True)}
    assert out["a"] == out["c"] | {"candidate_id": "a"}
    assert out["a"]["rating"] == pytest.approx(-out["b"]["rating"])
    assert out["a"]["rating"] > 0
    assert (out["c"]["player"], out["c"]["comparisons"]) == ("a", 1)


def test_ratings_that_comparisons_do_not_settle_are_flagged():
    rows = [row(c, c) for c in "abcd"]

    def flags(*played: tuple[str, str, float]) -> str | None:
        return rate(rows, [{"a": a, "b": b, "outcome": o} for a, b, o in played], config_of(prior_sd=2.5), None)[0]["rating_flags"]

    assert flags(("a", "b", 0.6), ("c", "d", 0.6)) == "disconnected"
    assert flags(("a", "b", 1.0), ("b", "c", 0.5), ("c", "d", 0.5)) == "separated"
    assert flags(("a", "b", 0.6), ("b", "c", 0.5), ("c", "d", 0.5)) is None


def test_a_judge_that_always_prefers_the_first_shown_calls_a_draw():
    made = comparison("a", "b", Answer(0.9, 0.0, None), Answer(0.9, 0.1, None))
    assert (made["p_first"], made["p_second"]) == (0.9, pytest.approx(0.1))
    assert made["outcome"] == pytest.approx(0.5)
    assert made["outside"] == pytest.approx(0.05)


@pytest.mark.parametrize(("one", "other", "expected"), [
    (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5), (0.5, 0.5, 0.5), (1.0, 0.3, 1.0), (0.0, 0.3, 0.0),
    (1e-300, 1.0, 1.0), (1 - 1e-16, 1e-16, 0.5)])
def test_verdicts_without_a_doubt_have_an_outcome_too(one, other, expected):
    assert pooled(one, other) == pooled(other, one) == pytest.approx(expected, abs=0.05)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_a_preference_for_a_place_cancels(difference, bias):
    first, second = (1 / (1 + math.exp(-x)) for x in (difference + bias, bias - difference))
    fair = 1 / (1 + math.exp(-difference))
    assume(min(first, 1 - first, second, 1 - second) > 1e-12)
    made = comparison("a", "b", Answer(first, 0.0, None), Answer(second, 0.0, None))
    assert made["outcome"] == pytest.approx(fair, abs=1e-3)


def test_one_failed_order_is_an_abstention():
    made = comparison("a", "b", Answer(0.9, 0.0, None), Answer(None, None, "timeout: x"))
    assert (made["p_first"], made["p_second"], made["outcome"], made["reason"]) == (0.9, None, None, "timeout: x")


def config_of(**quality) -> RunConfig:
    return RunConfig.model_validate({"run": "r", "model": {"path": "m"}, "sources": [{"name": "s", "path": "p.jsonl"}],
                                     "heuristics": {}, "quality": quality})


def test_planned_calls_of_the_full_grid():
    ranking = config_of(schedule="ranking")
    assert calls_of(1, ranking) == 0
    assert calls_of(8, ranking) == (math.ceil(math.log2(8)) + 1) * 4 * 2
    assert calls_of(396, ranking) == 10 * 198 * 2
    assert calls_of(396, config_of(schedule="ranking", rounds=3)) == 3 * 198 * 2
    assert calls_of(396, config_of()) < calls_of(396, ranking)
    assert calls_of(396, config_of(method="pointwise")) == 396


def test_the_judge_sees_the_whole_exchange_without_the_system_message():
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    assert transcript([system, user]) == "u"
    assert transcript([user, {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"}]) == (
        "User: u\nAssistant: a\nUser: v")


def facts(ctx) -> tuple[int, int]:
    """(judge calls, verdicts that another run gave), over all shards."""
    found = [m.facts for n in range(ctx.shards) if (m := ctx.store.manifest(f"labels/quality/shard-{n:04d}.parquet"))]
    return sum(f["calls"] for f in found), sum(f["spared"] for f in found)


def test_another_run_asks_only_for_what_no_run_has_asked(tmp_path, tiny_model):
    with FakeSGLang() as server:
        first = build(make_config(tmp_path, tiny_model, [server.url], run="first"), JUDGED)
        asked = len(server.judgements)
        assert facts(first) == (asked, 0)
        again = build(make_config(tmp_path, tiny_model, [server.url], run="again"), JUDGED)
        # a hub model without a revision, or a folder without weights as here, may be another tomorrow
        assert facts(again) == (asked, 0)
        (tiny_model / "model.safetensors").write_bytes(b"weights")
        try:
            build(make_config(tmp_path, tiny_model, [server.url], run="weighed"), JUDGED)
            before = len(server.judgements)
            spared = build(make_config(tmp_path, tiny_model, [server.url], run="spared"), JUDGED)
            assert len(server.judgements) == before
            assert facts(spared) == (0, asked)
            other = make_config(tmp_path, tiny_model, [server.url], run="other",
                                quality={"max_prompt_tokens": 1599})
            assert facts(build(other, JUDGED)) == (asked, 0)
            alone = make_config(tmp_path, tiny_model, [server.url], run="alone",
                                quality={"max_prompt_tokens": 1600, "cache": "off"})
            assert facts(build(alone, JUDGED)) == (asked, 0)
            (tiny_model / "model.safetensors").write_bytes(b"weights, trained further")
            assert facts(build(make_config(tmp_path, tiny_model, [server.url], run="trained"), JUDGED)) == (asked, 0)
        finally:
            (tiny_model / "model.safetensors").unlink()
    for name in ("comparisons", "labels/quality"):
        assert tables(first, name) == tables(spared, name)


def test_groups_that_hold_the_same_texts_share_their_judgements(tmp_path, tiny_model):
    with FakeSGLang() as server:
        raw = make_config(tmp_path, tiny_model, [server.url], seeds=[0, 1, 2, 3],
                          generation={"generator": {"max_new_tokens": 1}})
        ctx = build(raw, JUDGED)
        calls = server.judgements
    assert len({tuple(c["input_ids"]) for c in calls}) == len(calls) == facts(ctx)[0]
    assert 2 * len(tables(ctx, "comparisons")) > len(calls)
