"""Whole tournaments over judges with a will of their own: biased, noisy, intransitive, failing."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from tests.fake_sglang import FakeSGLang
from tests.runs import build, make_config

JUDGED = ["generate", "verify", "quality"]
PLAYERS = 24
PAIR = re.compile(r"Answer A: (.*?)\n\nAnswer B: (.*?)\n\nWhich answer is better", re.DOTALL)

Taste = Callable[[str, str], float]
"""(text shown first, text shown second) -> log-odds that the first is better."""


def worth(text: str) -> float:
    """The true quality of a text, in logits: standard normal."""
    u = (int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) + 0.5) / 16**12
    return float(np.sqrt(2) * scipy.special.erfinv(2 * u - 1))


def chance(*parts: str) -> float:
    """In (0, 1), by the texts alone: a judge asked twice says the same."""
    return (int(hashlib.sha256("|".join(parts).encode()).hexdigest()[:12], 16) + 0.5) / 16**12


def shown(payload: dict[str, Any]) -> tuple[str, str]:
    """The two texts that a judgement shows."""
    text = bytes(i for i in payload["input_ids"] if i < 256).decode()
    return PAIR.findall(text)[-1]


class Judging(FakeSGLang):
    """A server that judges by a taste."""

    taste: Taste

    def judge(self, payload: dict[str, Any]) -> dict[str, Any]:
        answer = super().judge(payload)
        log_odds = self.taste(*shown(payload))
        a, b = payload["token_ids_logprob"]
        total = math.log(0.98)
        answer["meta_info"]["output_token_ids_logprobs"] = [[
            [total - math.log1p(math.exp(-log_odds)), a, None], [total - math.log1p(math.exp(log_odds)), b, None]]]
        return answer


@pytest.fixture(autouse=True)
def _same_candidates_everywhere(tmp_path, tiny_model, monkeypatch):
    """A model's path is part of its candidates' seeds: one that is the same wherever the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model)


def tables(ctx, name: str) -> list[dict]:
    return [r for n in range(ctx.shards) for r in ctx.store.read(f"{name}/shard-{n:04d}.parquet").to_pylist()]


def tournament(folder, model, taste: Taste, fault=None, **quality: Any):
    """One prompt, 24 candidates: (rows of the labels with their texts, comparisons, judgements asked for)."""
    heuristics = folder / "many.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    heuristics.write_text(str({"sampling_pipelines": [
        {"name": f"t{n}", "processors": [{"name": "temperature", "params": {"temperature": 0.5 + n / 50}}]}
        for n in range(PLAYERS)]}))
    with Judging(fault=fault) as server:
        server.taste = taste
        raw = make_config(folder, model, [server.url], seeds=[0], labels=["quality"],
                          heuristics={"files": [str(heuristics)]}, quality={"max_prompt_tokens": 1600} | quality)
        raw["sources"] = [raw["sources"][1] | {"limit": 1}]
        raw["model"] = {"path": "tiny"}
        ctx = build(raw, JUDGED)
        asked = len(server.judgements)
    texts = {r["candidate_id"]: r["text"] for r in tables(ctx, "verified")}
    rows = [r | {"text": texts[r["candidate_id"]]} for r in tables(ctx, "labels/quality")]
    assert len({r["player"] for r in rows}) > 20
    return rows, tables(ctx, "comparisons"), asked


def correlation(rows: list[dict]) -> float:
    players = {r["player"]: r for r in rows}.values()
    return float(np.corrcoef([r["rating"] for r in players], [worth(r["text"]) for r in players])[0, 1])


def honest(first: str, second: str) -> float:
    return worth(first) - worth(second)


def refit(rows: list[dict], comparisons: list[dict]) -> dict[str, float]:
    """The ratings again, from what is stored and nothing else, by a general optimiser."""
    [(sd, dispersion)] = {(r["prior_sd"], r["dispersion"]) for r in rows}
    players = sorted({r["player"] for r in rows if r["comparisons"]})
    judged = [(players.index(c["a"]), players.index(c["b"]), c["outcome"]) for c in comparisons
              if c["outcome"] is not None]
    i, j, y = (np.array(column) for column in zip(*judged, strict=True))

    def negative(r: np.ndarray) -> float:
        d = r[i] - r[j]
        return float((y * np.logaddexp(0, -d) + (1 - y) * np.logaddexp(0, d)).sum() / dispersion + r @ r / sd**2 / 2)

    found = scipy.optimize.minimize(negative, np.zeros(len(players)), method="BFGS", options={"gtol": 1e-9}).x
    return dict(zip(players, found - found.mean(), strict=True))


@pytest.mark.parametrize("schedule", ["ranking", "top_k"])
def test_the_stored_comparisons_give_the_ratings_again(tmp_path, tiny_model, schedule):
    rows, comparisons, asked = tournament(tmp_path, tiny_model, honest, schedule=schedule)
    assert asked == 2 * len(comparisons)
    again = refit(rows, comparisons)
    assert {r["player"]: r["rating"] for r in rows} == pytest.approx(again, abs=1e-4)
    for c in comparisons:
        odds = [math.log(p / (1 - p)) for p in (c["p_first"], c["p_second"])]
        assert c["outcome"] == pytest.approx(1 / (1 + math.exp(-sum(odds) / 2)))


def test_an_honest_judge_is_believed(tmp_path, tiny_model):
    rows, _, _ = tournament(tmp_path, tiny_model, honest, schedule="ranking")
    assert correlation(rows) > 0.99
    inside = [abs(r["rating"] - worth(r["text"]) + np.mean([worth(x["text"]) for x in rows])) <= 3 * r["rating_se"] + 0.1
              for r in rows]
    assert np.mean(inside) > 0.8
    assert all(r["reliability"] > 0.9 for r in rows)


def test_a_judge_that_favours_a_position_ranks_as_an_honest_one(tmp_path, tiny_model):
    rows, comparisons, _ = tournament(tmp_path, tiny_model, lambda a, b: honest(a, b) + 2.0, schedule="ranking")
    fair, _, _ = tournament(tmp_path / "fair", tiny_model, honest, schedule="ranking")
    assert [r["rating"] for r in rows] == pytest.approx([r["rating"] for r in fair], abs=1e-6)
    flipped = np.mean([(c["p_first"] > 0.5) != (c["p_second"] > 0.5) for c in comparisons])
    assert flipped > 0.5


def test_the_top_is_found_with_fewer_calls(tmp_path, tiny_model):
    rows, comparisons, _ = tournament(tmp_path / "k", tiny_model, honest, top=3)
    _, all_of_them, _ = tournament(tmp_path / "r", tiny_model, honest, schedule="ranking", stop="rounds")
    assert len(comparisons) < 0.75 * len(all_of_them)
    best = sorted({r["player"]: r for r in rows}.values(), key=lambda r: -worth(r["text"]))
    found = sorted(best, key=lambda r: -r["rating"])
    assert {r["player"] for r in found[:3]} == {r["player"] for r in best[:3]}


def test_a_judge_that_tosses_coins_is_not_believed(tmp_path, tiny_model):
    def coin(a: str, b: str) -> float:
        return 4.0 if chance(a, b) < 0.5 else -4.0

    rows, _, _ = tournament(tmp_path, tiny_model, coin, schedule="ranking")
    assert abs(correlation(rows)) < 0.6
    assert all(r["reliability"] < 0.6 and not r["settled"] for r in rows)


def test_an_intransitive_judge_ends_and_is_not_certain(tmp_path, tiny_model):
    def circle(a: str, b: str) -> float:
        """Each beats the next half of the circle."""
        return 3.0 if (chance(b) - chance(a)) % 1 < 0.5 else -3.0

    rows, comparisons, _ = tournament(tmp_path, tiny_model, circle, schedule="ranking")
    assert comparisons
    assert all(r["rating"] is not None and math.isfinite(r["rating"]) for r in rows)
    assert all(r["reliability"] < 0.8 for r in rows)


@pytest.mark.parametrize("schedule", ["ranking", "top_k"])
def test_a_judge_that_fails_every_fifth_time_abstains_and_invents_nothing(tmp_path, tiny_model, schedule):
    def fault(_: int, payload: dict[str, Any]) -> str | None:
        return "400" if "token_ids_logprob" in payload and chance(*shown(payload)) < 0.2 else None

    rows, comparisons, _ = tournament(tmp_path, tiny_model, honest, schedule=schedule, fault=fault)
    text = {r["player"]: r["text"] for r in rows}
    for c in comparisons:  # a refusal is of its own judgement, not of those that it shares a request with
        a, b = text[c["a"]], text[c["b"]]
        assert (c["p_first"] is None) == (chance(a, b) < 0.2)
        assert (c["p_second"] is None) == (chance(b, a) < 0.2)
        assert (c["outcome"] is None) == (c["p_first"] is None or c["p_second"] is None) == (c["reason"] is not None)
        assert c["reason"] is None or c["reason"].startswith("rejected")
    assert 0.1 < sum(c["outcome"] is None for c in comparisons) / len(comparisons) < 0.6
    counts = {r["player"]: r["comparisons"] for r in rows}
    for player, count in counts.items():
        assert count == sum(player in (c["a"], c["b"]) for c in comparisons if c["outcome"] is not None)
    assert all((r["rating"] is None) == (r["comparisons"] == 0) for r in rows)
    assert {r["player"]: r["rating"] for r in rows if r["rating"] is not None} == pytest.approx(
        refit(rows, comparisons), abs=1e-4)
    if schedule == "ranking":
        assert correlation(rows) > 0.95
