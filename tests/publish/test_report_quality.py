"""What the report and the card say of quality, against brute force over the rows."""

from __future__ import annotations

import collections
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats

from tasks.context import Context
from tasks.publish import report
from tasks.publish.card import card
from tasks.publish.intervals import wilson
from tasks.publish.report_boards import side_by_side
from tasks.publish.report_judge import how_rated, judge_lines, shrinkage_note
from tasks.publish.report_parts import escape
from tasks.publish.report_quality import JudgeTally, RewardModelTally
from tasks.publish.score import labelled, lead
from tests.publish.synthetic import make_run

Rows = list[dict[str, Any]]


def _rows(ctx: Context, folder: str) -> Rows:
    return [r for n in range(ctx.shards) for r in ctx.store.read(f"{folder}/shard-{n:04d}.parquet").to_pylist()]


def _joined(ctx: Context) -> Rows:
    labels = {name: {r["candidate_id"]: r for r in _rows(ctx, f"labels/{name}")} for name in ("quality", "verifiers")}
    return [r | labels["quality"].get(r["candidate_id"], {}) | labels["verifiers"].get(r["candidate_id"], {})
            for r in _rows(ctx, "verified") if r["usable"]]


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return make_run(tmp_path_factory.mktemp("run"), prompts=18, heuristics=14)


@pytest.fixture(scope="module")
def data(ctx: Context) -> dict[str, Any]:
    return report.gather(ctx)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return make_run(tmp_path_factory.mktemp("scored"), quality={"method": "pointwise"})


@pytest.fixture(scope="module")
def scored_data(scored: Context) -> dict[str, Any]:
    return report.gather(scored)


# -- tournament ----------------------------------------------------------------------------------


def test_the_judges_figures_equal_those_counted_pair_by_pair(ctx: Context, data: dict[str, Any]) -> None:
    pairs, found = _rows(ctx, "comparisons"), data["judge"]
    judged = [p for p in pairs if p["outcome"] is not None]
    flips = sum((p["p_first"] > 0.5) != (p["p_second"] > 0.5) for p in judged)
    assert (found["comparisons"], found["abstained"]) == (len(pairs), len(pairs) - len(judged))
    assert 0 < found["abstained"] == sum(found["reasons"].values())
    assert (found["flips"], found["flip_rate"]) == (flips, pytest.approx(flips / len(judged), abs=1e-6))
    assert found["outside"] == pytest.approx(np.mean([p["outside"] for p in judged]), abs=1e-6)


def _clustered(per_prompt: dict[str, list[float]]) -> tuple[float, float, float]:
    """A share's interval by its definition (Korn and Graubard), from the values themselves."""
    values = np.array(list(itertools.chain.from_iterable(per_prompt.values())))
    share, n, g = values.mean(), len(values), len(per_prompt)
    between = g / (g - 1) * sum(sum(v - share for v in part) ** 2 for part in per_prompt.values()) / n**2
    effect = max(1.0, between / (share * (1 - share) / (n - 1)))
    size = n / effect * (scipy.stats.t.ppf(0.975, n - 1) / scipy.stats.t.ppf(0.975, g - 1)) ** 2
    low, high = wilson(float(share * size), float(size))
    assert low is not None and high is not None
    return float(share), low, high


def test_agreement_with_the_verifier_is_counted_pair_by_pair_with_prompts_as_clusters(
        ctx: Context, data: dict[str, Any]) -> None:
    reward = {r["candidate_id"]: r.get("reward") for r in _joined(ctx)}
    told: dict[str, list[float]] = collections.defaultdict(list)
    for p in _rows(ctx, "comparisons"):
        a, b = reward.get(p["a"]), reward.get(p["b"])
        if p["outcome"] is not None and None not in (a, b) and a != b:
            told[p["prompt_id"]].append(float((p["outcome"] > 0.5) == (a == 1)))
    found = data["judge"]["verifier"]
    assert (found["pairs"], found["prompts"], found["undecided"]) == (sum(map(len, told.values())), len(told), 0)
    assert found["prompts"] > 3
    assert (found["agrees"], found["low"], found["high"]) == pytest.approx(_clustered(told), abs=1e-5)


def test_one_prompts_many_pairs_say_little_of_the_judge() -> None:
    n = 60
    pairs = pl.DataFrame({
        "prompt_id": ["p"] * n, "a": [f"r{k}" for k in range(n)], "b": [f"w{k}" for k in range(n)],
        "p_first": [0.9] * n, "p_second": [0.9] * n, "outcome": [0.9] * n, "outside": [0.0] * n,
        "reason": pl.Series([None] * n, dtype=pl.String)})
    rewards = pl.DataFrame({"candidate_id": [*pairs["a"], *pairs["b"]], "reward": [1.0] * n + [0.0] * n})
    tally = JudgeTally()
    tally.add(pairs, rewards)
    found = (tally.figures() or {})["verifier"]
    assert (found["pairs"], found["prompts"], found["agrees"]) == (n, 1, 1.0) and found["low"] < 0.3


def test_groups_are_counted_settled_and_reliable_overall_and_by_source(ctx: Context, data: dict[str, Any]) -> None:
    groups: dict[tuple[str, int], dict[str, Any]] = {(r["prompt_id"], r["seed"]): r for r in _joined(ctx)}
    sources = {s.name for s in ctx.config.sources}
    told = {None: data["judge"]["groups"]} | data["judge"]["by_source"]
    assert set(told) == {None, *sources}
    for source, found in told.items():
        own = [g for g in groups.values() if source in (None, g["source"])]
        settled = [g["settled"] for g in own if g["settled"] is not None]
        assert (found["n"], found["to_settle"], found["settled"]) == (len(own), len(settled), sum(settled))
        assert found["settled_share"] == pytest.approx(np.mean(settled), abs=1e-6)
        reliability = [g["reliability"] for g in own]
        assert found["reliability"]["mean"] == pytest.approx(np.mean(reliability), abs=1e-6)
        assert [found["reliability"][q] for q in ("p10", "median", "p90")] == pytest.approx(
            np.quantile(reliability, [0.1, 0.5, 0.9]), abs=1e-6)
        assert found["reliability_bins"] == [sum(int(v * 10) == n for v in reliability) for n in range(10)]
        for column in ("prior_sd", "dispersion"):
            assert found[column]["median"] == pytest.approx(np.median([g[column] for g in own]), abs=1e-6)
    flagged = sum("separated" in (g["rating_flags"] or "") for g in groups.values())
    assert data["judge"]["groups"]["flags"] == {"not_converged": flagged, "separated": flagged} and flagged


def test_calls_come_from_the_labels_manifests_and_are_shared_by_rated_candidates(
        ctx: Context, data: dict[str, Any]) -> None:
    rows = [r for r in _joined(ctx) if r.get("rating") is not None]
    q = data["quality"]
    assert (q["calls"], q["spared"], q["rated"]) == (7 + 14, 0 + 1, len(rows))
    assert q["calls_per_candidate"] == pytest.approx(21 / len(rows), abs=1e-6)
    spent = [r["comparisons"] for r in rows]
    found = data["judge"]["comparisons_per_candidate"]
    assert (found["n"], found["most"]) == (len(rows), max(spent))
    assert (found["mean"], found["median"]) == pytest.approx((np.mean(spent), np.median(spent)), abs=1e-6)
    assert data["judge"]["mean_rating_se"] == pytest.approx(np.mean([r["rating_se"] for r in rows]), abs=1e-6)
    assert f"21 by this run, {21 / len(rows):.2f} a rated candidate; 1 more verdicts known" in report.markdown(data)


def test_calls_that_a_shard_does_not_tell_are_not_guessed(tmp_path: Path) -> None:
    ctx = make_run(tmp_path, prompts=6, heuristics=4, seeds=1)
    path = "labels/quality/shard-0001.parquet"
    ctx.store.write_table(path, ctx.store.read(path), "k")
    data = report.gather(ctx)
    assert data["quality"]["calls"] is None and data["quality"]["calls_per_candidate"] is None
    assert dict(judge_lines(data))["judge calls"] == "not recorded"


def test_every_sources_means_and_intervals_follow_from_its_rows(ctx: Context, data: dict[str, Any]) -> None:
    rows = [r for r in _joined(ctx) if r.get("rating") is not None]
    for h in data["heuristics"]:
        for source, found in h["sources"].items():
            per: dict[str, list[float]] = collections.defaultdict(list)
            squares = 0.0
            for r in rows:
                if (r["heuristic_id"], r["source"]) == (h["id"], source):
                    per[r["prompt_id"]].append(r["rating"])
                    squares += r["rating_se"] ** 2
            values = list(itertools.chain.from_iterable(per.values()))
            mean, g, n = np.mean(values), len(per), len(values)
            se = np.sqrt(g / (g - 1) * sum(sum(v - mean for v in part) ** 2 for part in per.values())) / n
            half = max(scipy.stats.t.ppf(0.975, g - 1) * se, scipy.stats.norm.ppf(0.975) * np.sqrt(squares) / n)
            assert (found["rated"], found["rated_prompts"]) == (n, g)
            assert (found["rating"], found["rating_low"], found["rating_high"]) == pytest.approx(
                (mean, mean - half, mean + half), abs=1e-5)
    assert all("rating" not in s["figures"] for s in data["sources"])  # 0 by construction


def test_the_board_by_source_has_every_mean_with_its_interval(data: dict[str, Any]) -> None:
    board = side_by_side(data)
    heads = re.findall(r'<th class="cell" scope="col">(.*?)</th>', board)
    assert heads == ["all", "stories", "sums", "chat"]
    cells = re.findall(r">([+\u2212][\d.]+)<small>\u00b1([\d.]+)</small>", board)
    expected = [(f["rating"], f["rating_high"] - f["rating"]) for h in data["heuristics"]
                for f in (h, *(h["sources"][s] for s in heads[1:]))]
    assert [(float(m.replace("\u2212", "-")), float(w)) for m, w in cells] == [
        pytest.approx(e, abs=0.0051) for e in expected]


def test_a_source_with_one_prompt_shows_means_without_intervals(tmp_path: Path) -> None:
    data = report.gather(make_run(tmp_path, prompts=4, heuristics=5, seeds=2, shards=1))
    board = side_by_side(data)
    assert board.count("\u00b1") == 1 + 2 * 5  # the note; all sources and the one that has two prompts
    assert board.count("<small></small>") == 2 * 5


def test_one_source_has_no_board_of_its_own(tmp_path: Path) -> None:
    data = report.gather(make_run(tmp_path, prompts=1, heuristics=3, seeds=2, shards=1))
    assert side_by_side(data) == "" and "by source" not in report.markdown(data)


def test_four_hundred_heuristics_on_thirteen_sources_fit_the_page(tmp_path: Path) -> None:
    data = report.gather(make_run(tmp_path, heuristics=400, prompts=13, seeds=1, shards=1, labels=("quality",),
                                  more_sources=10))
    board = side_by_side(data)
    shown, folded = board.split("<details>")
    assert shown.count("<tr>") == 1 + 20 + 20 and folded.count("<tr>") == 1 + len(data["heuristics"])
    assert shown.count('scope="col"') == 2 + 13 and '<div class="scroll">' in shown
    page = report.render_html(data)
    assert len(page) < 2_000_000 and f"All {len(data['heuristics'])} heuristics" in page
    grid = page.split("<h2>Temperature and truncation</h2>")[1].split("</section>")[0]
    assert grid.count("<tr>") == 33 and 'scope="row">no truncation<' in grid
    assert "top_p 0.77" not in grid  # beside the grid


# -- pointwise -----------------------------------------------------------------------------------


def test_pointwise_heuristics_are_ranked_by_what_lies_above_their_groups_mean(
        scored: Context, scored_data: dict[str, Any]) -> None:
    rows = [r for r in _joined(scored) if r.get("rm_score") is not None]
    groups: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    for r in rows:
        groups[r["prompt_id"], r["seed"]].append(r["rm_score"])
    assert scored_data["ranked_by"] == "rm_score"
    for h in scored_data["heuristics"]:
        own = [r["rm_score"] - np.mean(groups[r["prompt_id"], r["seed"]]) for r in rows if r["heuristic_id"] == h["id"]]
        assert h["rm_score"] == pytest.approx(np.mean(own), abs=1e-6) and h["rated"] == len(own)
        assert h["rm_score_low"] < h["rm_score"] < h["rm_score_high"] < h["rm_score"] + 2  # not the prompts' levels
        assert h["rating"] is None
    means = [h["rm_score"] for h in scored_data["heuristics"]]
    assert means == sorted(means, reverse=True)
    assert "highest mean lead in reward" in report.markdown(scored_data)


def test_a_reward_models_failures_are_told_by_reason(scored: Context, scored_data: dict[str, Any]) -> None:
    rows = _joined(scored)
    failed = sum(r.get("rm_score") is None for r in rows)
    found = scored_data["reward_model"]
    assert found["reasons"] == {"timeout": failed} and found["unscored"] == failed > 0
    assert found["scored"] == scored_data["quality"]["rated"] == len(rows) - failed
    values = np.array([r["rm_score"] for r in rows if r.get("rm_score") is not None])
    assert (found["mean"], found["sd"]) == pytest.approx((values.mean(), values.std()), abs=1e-4)
    page = report.render_html(scored_data)
    assert "<h2>The reward model</h2>" in page and f"{failed}; timeout {failed}" in page
    assert scored_data["judge"] is None and "Swiss" not in page and "timeout: <" not in page


def test_a_reward_model_agrees_with_the_verifier_as_often_as_its_pairs_do() -> None:
    rng = np.random.default_rng(3)
    frame = pl.DataFrame([{"usable": True, "prompt_id": f"p{n % 5}", "seed": n % 2, "rm_reason": None,
                           "rm_score": [None, *map(float, range(6))][rng.integers(7)], "rm_lead": 0.0,
                           "reward": [None, 0.0, 1.0][rng.integers(3)]} for n in range(150)],
                         schema_overrides={"rm_reason": pl.String})
    told: dict[str, list[float]] = collections.defaultdict(list)
    for (prompt, _), group in frame.drop_nulls(["rm_score", "reward"]).group_by("prompt_id", "seed"):
        of = {reward: group.filter(reward=reward)["rm_score"] for reward in (0.0, 1.0)}
        told[str(prompt)] += [0.5 * (r == w) + (r > w) for r in of[1.0] for w in of[0.0]]
    tally = RewardModelTally()
    tally.add(frame)
    found = tally.figures()["verifier"]
    assert found["undecided"] == sum(v == 0.5 for part in told.values() for v in part) > 0
    assert found["pairs"] == sum(map(len, told.values()))
    assert (found["agrees"], found["low"], found["high"]) == pytest.approx(_clustered(told), abs=1e-5)


def test_a_score_counts_by_what_it_has_over_its_group(scored: Context) -> None:
    frame = labelled(scored, 0).drop_nulls("rm_score")
    means = frame.group_by("prompt_id", "seed").agg(pl.col("rm_score").mean())["rm_score"]
    assert means.abs().max() < 1e-9 and frame["rm_score"].std() < 5  # type: ignore[operator]
    scores = pl.DataFrame(_rows(scored, "scores")).drop_nulls("z_quality").join(
        pl.concat([labelled(scored, n) for n in (0, 1)]).select("candidate_id", "rm_score"), on="candidate_id")
    assert scores.height == scores["rm_score"].count() > 0
    assert scores.select(pl.corr("z_quality", "rm_score")).item() == pytest.approx(1)
    assert scores["z_quality"].std(ddof=0) == pytest.approx(1)


def test_equal_scores_have_a_lead_of_exactly_nothing() -> None:
    frame = pl.DataFrame({"prompt_id": ["p"] * 3 + ["q"] * 3, "seed": [0] * 6,
                          "rm_score": [0.1, 0.1, 0.1, 3.0, 5.0, None]})
    assert frame.select(lead("rm_score"))["rm_score"].to_list() == [0.0, 0.0, 0.0, -1.0, 1.0, None]


# -- words ---------------------------------------------------------------------------------------


def _told(folder: Path, **quality: Any) -> tuple[Context, dict[str, Any], str]:
    ctx = make_run(folder, prompts=3, heuristics=3, seeds=1, shards=1, quality=quality)
    data = report.gather(ctx)
    return ctx, data, card(ctx, data, {"train": 1})


def test_the_card_says_how_ratings_were_made_as_configured(tmp_path: Path) -> None:
    _, data, text = _told(tmp_path / "a", top=7, confidence=0.9)
    assert "among the best 7 (schedule top_k)" in text
    assert ("once 90 % of the best named were expected to be of the true best, at the latest after two fifths of the "
            "comparisons of ceil(log2(players)) + 1 rounds (small groups: players + 14, if that is more)") in text
    assert "each pair in both orders" in text and "from its own comparisons (auto)" in text
    assert "it judged itself" in text and "judged them itself" in text and "Swiss" not in text
    assert shrinkage_note(data) and "Losers are compared less" in text
    _, data, text = _told(tmp_path / "b", schedule="ranking", rounds=6, stop="rounds", prior_sd=2.5, solver="choix",
                          model={"path": "a/judge", "revision": "r1"})
    assert "ranks everyone in Swiss rounds" in text and "it took 6 rounds" in text
    assert "is given as 2.5 logits" in text and "the maximum of the likelihood (solver choix)" in text
    assert "a/judge at r1 (another model than the one that wrote the answers)" in text
    assert "judged itself" not in text and "judged them itself" not in text
    assert not shrinkage_note(data) and "Losers are compared less" not in text + report.render_html(data)
    assert "explained 99.5\u00a0% of" in " ".join(how_rated(data | {"quality": data["quality"] | {
        "stop": "settled", "reliability": 0.995}}))


def test_the_card_says_which_columns_hold_scores_and_which_are_empty(tmp_path: Path) -> None:
    _, _, text = _told(tmp_path / "a")
    assert "`rm_score` is null" in text and "`reliability` is the share" in text
    _, _, text = _told(tmp_path / "b", method="pointwise")
    assert "scored each answer by itself (method pointwise)" in text and "`reliability` are null" in text
    assert "Ratings compare answers" not in text and "| abstained |" not in text and "Losers" not in text


def test_every_measured_figure_is_in_the_page_the_summary_and_the_card(ctx: Context, data: dict[str, Any]) -> None:
    lines = judge_lines(data)
    assert [k for k, _ in lines] == [
        "judge", "comparisons", "judge calls", "abstained", "order flips", "first shown", "decisiveness",
        "outside the verdicts", "groups settled", "reliability of a group", "prior's deviation in the fit", "dispersion",
        "standard error of a rating", "leaning on the prior", "agrees with the verifier"]
    page, short, text = report.render_html(data), report.markdown(data), card(ctx, data, data["dataset"])
    for label, value in lines:
        assert f"<dt>{label.replace(chr(39), '&#x27;')}</dt>" in page
        for written in (short, text):
            assert f"| {label} | {escape(value)} |" in written
    assert "## Mean rating by source" in short and "## Mean rating by source" in text


def test_ratings_that_could_not_be_made_are_no_figures(tmp_path: Path) -> None:
    ctx = make_run(tmp_path, prompts=6, heuristics=4, seeds=2, rated=False)
    data = report.gather(ctx)
    assert data["ranked_by"] == "pass_rate" and data["quality"]["rated"] == 0
    assert data["judge"]["groups"]["reliability"] is None and data["judge"]["mean_rating_se"] is None
    assert data["judge"]["groups"]["flags"] == {"disconnected": data["judge"]["groups"]["n"]}
    told = dict(judge_lines(data))
    assert "reliability of a group" not in told and "\u2013" not in told["judge calls"]
    assert "Losers are compared less" not in card(ctx, data, data["dataset"])
