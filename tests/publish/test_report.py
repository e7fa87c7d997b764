from __future__ import annotations

import collections
import concurrent.futures
import html.parser
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tasks.context import Context
from tasks.publish import report
from tasks.publish.intervals import mean_interval, share_interval, wilson
from tasks.publish.report_parts import figure_text, headline, markdown_table, num, pareto, ticks
from tasks.publish.report_quality import JudgeTally
from tasks.publish.report_tally import HeuristicTally, quantile
from tests.publish.synthetic import SCRIPT, make_run


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(ctx: Context) -> dict[str, Any]:
    return report.gather(ctx)


@pytest.fixture(scope="module")
def rows(ctx: Context) -> pl.DataFrame:
    """All candidates with their labels, joined by another engine."""
    root = ctx.store.root
    return duckdb.sql(f"""
        SELECT v.*, q.* EXCLUDE (candidate_id), self_bleu, embedding_entropy, reward, kept, dropped FROM '{root}/verified/*.parquet' v
        LEFT JOIN '{root}/labels/quality/*.parquet' q USING (candidate_id)
        LEFT JOIN '{root}/labels/diversity/*.parquet' USING (candidate_id)
        LEFT JOIN '{root}/labels/verifiers/*.parquet' USING (candidate_id)
        LEFT JOIN '{root}/scores/*.parquet' s USING (candidate_id)""").pl()


VARIANTS = {
    "whole": {}, "quality only, one seed": {"labels": ("quality",), "seeds": 1, "verified_sources": False},
    "no labels": {"labels": ()}, "verifiers only": {"labels": ("verifiers",), "failures": 0.0},
    "one seed, all labels": {"seeds": 1}, "diversity only": {"labels": ("diversity",)},
    "one heuristic, one prompt": {"heuristics": 1, "prompts": 1, "shards": 1, "seeds": 1, "failures": 0.0},
    "everything failed": {"failures": 1.0, "prompts": 4}, "pointwise": {"quality": {"method": "pointwise"}},
    "nothing rated": {"rated": False, "labels": ("quality",)},
    "nothing scored": {"rated": False, "labels": ("quality",), "quality": {"method": "pointwise"}},
}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {name: report.gather(make_run(tmp_path_factory.mktemp("variant"), **{"prompts": 6, **options}))
            for name, options in VARIANTS.items()}


# -- numbers -------------------------------------------------------------------------------------


def test_counts_are_those_of_the_files(data: dict[str, Any], rows: pl.DataFrame) -> None:
    usable = rows.filter("usable")
    assert data["funnel"] == {
        "planned": rows.height, "answered": rows.filter(pl.col("status") == "ok").height, "usable": usable.height,
        "labelled": usable.height, "checked": rows["reward"].count(), "correct": rows.filter(reward=1.0).height,
        "kept": rows.filter("kept").height}
    assert data["drops"] == dict(collections.Counter(rows["dropped"].drop_nulls()))
    failed = rows.filter(pl.col("status") != "ok")
    assert data["failures"]["by_kind"] == dict(sorted(collections.Counter(failed["status"]).items()))
    assert data["failures"]["by_server"] == dict(sorted(collections.Counter(failed["server"]).items()))
    assert data["requests"]["attempts"] == rows["attempts"].sum()
    assert data["requests"]["retries"] == (rows["attempts"] - 1).sum()
    assert data["requests"]["completion_tokens"] == rows["completion_tokens"].sum()
    assert sum(map(sum, data["lengths"]["bins"].values())) == data["funnel"]["answered"]
    lengths = rows.filter(pl.col("status") == "ok")["completion_tokens"].to_numpy()
    assert data["lengths"]["median"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert data["lengths"]["p90"] == np.quantile(lengths, 0.9, method="inverted_cdf")
    assert data["dataset"] == {"train": 33, "validation": 3}
    assert sum(s["figures"]["kept"] for s in data["sources"]) == data["funnel"]["kept"]


def test_a_heuristics_figures_equal_those_computed_from_all_rows(data: dict[str, Any], rows: pl.DataFrame) -> None:
    for h in data["heuristics"]:
        own = rows.filter(heuristic_id=h["id"])
        assert h["asked"] == own.height and h["failed"] == own.filter(pl.col("status") != "ok").height
        assert h["kept"] == own.filter("kept").height
        assert h["mean_tokens"] == pytest.approx(own.filter("usable")["completion_tokens"].mean(), abs=1e-6)
        assert h["rating"] == pytest.approx(own["rating"].mean(), abs=1e-6)
        assert h["pass_rate"] == pytest.approx(own["reward"].mean(), abs=1e-6)
        groups = own.drop_nulls("self_bleu").unique("prompt_id")
        assert h["self_bleu"] == pytest.approx(groups["self_bleu"].mean(), abs=1e-6)
        assert h["embedding_entropy"] == pytest.approx(groups["embedding_entropy"].mean(), abs=1e-6)
        low, high = _cluster_interval(own.drop_nulls("rating"))
        assert (h["rating_low"], h["rating_high"]) == pytest.approx((low, high), abs=1e-5)
        stories = own.filter(source="stories")
        assert h["sources"]["stories"]["rating"] == pytest.approx(stories["rating"].mean(), abs=1e-6)
        assert h["sources"]["stories"]["pass_rate"] is None
    ratings = [h["rating"] for h in data["heuristics"]]
    assert ratings == sorted(ratings, reverse=True)


def _cluster_interval(own: pl.DataFrame) -> tuple[float, float]:
    """By residuals, the textbook's way: sandwich of a regression on a constant; at least the values' own errors."""
    mean = own["rating"].mean()
    scores = [(part["rating"] - mean).sum() for _, part in own.group_by("prompt_id")]
    se = np.sqrt(len(scores) / (len(scores) - 1) * np.square(scores).sum()) / own.height
    own_se = np.sqrt(np.square(own["rating_se"]).sum()) / own.height
    low, high = scipy.stats.t(len(scores) - 1, mean, se).interval(0.95)
    least_low, least_high = scipy.stats.norm(mean, own_se).interval(0.95)
    return min(low, least_low), max(high, least_high)


def test_intervals_cover_the_truth_when_seeds_of_a_prompt_are_alike() -> None:
    rng, hits, draws = np.random.default_rng(1), 0, 1000
    for _ in range(draws):
        prompts, seeds = 8, 5
        values = rng.normal(0, 1, (prompts, 1)) + rng.normal(0, 0.3, (prompts, seeds))
        sums = values.sum(axis=1)
        _, low, high = mean_interval({
            "x_n": values.size, "x_s": sums.sum(), "x_clusters": prompts, "x_nn": prompts * seeds**2,
            "x_ss": (sums**2).sum(), "x_ns": (seeds * sums).sum()}, "x")
        hits += low <= 0 <= high  # type: ignore[operator]
    assert 0.93 <= hits / draws <= 0.97  # treating the 40 values as independent covers about 0.63


@given(st.integers(1, 200), st.data())
def test_wilson_equals_scipys(n: int, draw: st.DataObject) -> None:
    right = draw.draw(st.integers(0, n))
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def _sums(per_prompt: Sequence[tuple[float, float]]) -> dict[str, float]:
    n, s = np.array(per_prompt).T
    return {"x_n": n.sum(), "x_s": s.sum(), "x_clusters": len(n), "x_nn": (n * n).sum(), "x_ss": (s * s).sum(),
            "x_ns": (n * s).sum()}


def test_a_pass_rate_counts_equal_answers_to_a_prompt_once() -> None:
    independent = share_interval(_sums([(1, 1)] * 6 + [(1, 0)] * 4), "x")
    assert independent == pytest.approx((0.6, *wilson(6, 10)), abs=1e-6)
    _, low, high = share_interval(_sums([(8, 8)] * 6 + [(8, 0)] * 4), "x")  # how alike they are is guessed from ten
    assert low < independent[1] < independent[2] < high and high - low < 0.65  # type: ignore[operator]
    many = share_interval(_sums([(8, 8)] * 600 + [(8, 0)] * 400), "x")
    assert many == pytest.approx((0.6, *wilson(600, 1000)), abs=2e-4)
    assert share_interval(_sums([(8, 8)] * 3), "x") == pytest.approx((1.0, *wilson(3, 3)), abs=1e-6)


def test_the_interval_of_a_share_covers_it_whether_or_not_answers_are_alike() -> None:
    rng, draws = np.random.default_rng(2), 600
    for prompts, alike in ((4, 0.2), (10, 0.0), (10, 0.3), (40, 0.5)):
        hits = 0
        for _ in range(draws):
            n = rng.integers(4, 13, prompts)
            p = rng.beta(0.7 * (1 / alike - 1), 0.3 * (1 / alike - 1), prompts) if alike else 0.7
            _, low, high = share_interval(_sums(list(zip(n, rng.binomial(n, p), strict=True))), "x")
            hits += low <= 0.7 <= high  # type: ignore[operator]
        assert hits / draws >= 0.92, (prompts, alike)


def test_one_prompt_has_a_mean_and_no_interval_and_its_share_a_wide_one() -> None:
    assert mean_interval(_sums([(4, 6)]), "x") == (1.5, None, None)
    assert mean_interval({"x_n": 0, "x_s": 0.0, "x_clusters": 0}, "x") == (None, None, None)
    assert share_interval(_sums([(50, 25)]), "x") == pytest.approx((0.5, *wilson(0.5, 1)), abs=1e-6)
    _, low, high = share_interval(_sums([(50, 25), (50, 25)]), "x")
    assert low < 0.2 and high > 0.8  # type: ignore[operator]


def test_prompts_that_happen_to_be_equal_have_no_interval_but_that_of_their_own_errors() -> None:
    equal = _sums([(2, 0.2)] * 3)
    assert mean_interval(equal, "x") == (0.1, None, None)
    half = 1.959964 * np.sqrt(6 * 0.5**2) / 6
    assert mean_interval(equal | {"x_v": 6 * 0.5**2}, "x") == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-6)


def test_adding_shards_equals_adding_all_at_once(rows: pl.DataFrame) -> None:
    frame = rows.with_columns(pl.col("kept").fill_null(False), correct=(pl.col("reward") >= 1).cast(pl.Int64),
                              rm_lead=pl.col("rm_score"))
    whole, parts = HeuristicTally(), HeuristicTally()
    whole.add(frame)
    for _, part in frame.group_by("prompt_id"):
        parts.add(part)
    for key, row in whole.by_heuristic_and_source().items():
        assert parts.by_heuristic_and_source()[key] == pytest.approx(row)
    assert parts.overall() == pytest.approx(whole.overall())


def test_the_judges_figures_follow_from_its_pairs() -> None:
    pairs = pl.DataFrame({
        "prompt_id": list("1122"), "a": list("prtv"), "b": list("qsuw"), "p_first": [0.9, 0.8, 0.3, None], "p_second": [0.7, 0.2, 0.1, None],
        "outcome": [0.8, 0.5, 0.2, None], "outside": [0.1, 0.2, 0.3, None],
        "reason": [None, None, None, "timeout: 3 s; timeout: 4 s"]})
    rewards = pl.DataFrame({"candidate_id": list("pqrstu"), "reward": [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]})
    tally = JudgeTally()
    tally.add(pairs, rewards)
    found = tally.figures()
    assert found is not None
    assert (found["comparisons"], found["judged"], found["abstained"], found["abstained_share"]) == (4, 3, 1, 0.25)
    assert found["reasons"] == {"timeout": 1}
    assert found["flips"] == 1 and found["flip_rate"] == pytest.approx(1 / 3, abs=1e-6)
    # first shown: (0.9 + 0.3) / 2, (0.8 + 0.8) / 2, (0.3 + 0.9) / 2
    assert found["first_shown"] == pytest.approx((0.6 + 0.8 + 0.6) / 3, abs=1e-6)
    assert found["outside"] == pytest.approx(0.2)
    # one for the right one, one for the wrong one, one undecided
    assert (found["verifier"]["pairs"], found["verifier"]["prompts"], found["verifier"]["undecided"]) == (3, 2, 1)
    assert found["verifier"]["agrees"] == 0.5 and found["verifier"]["high"] - found["verifier"]["low"] > 0.5


def test_verification_facts_are_summed_over_shards(ctx: Context, data: dict[str, Any]) -> None:
    facts = [ctx.store.manifest(f"verified/shard-000{n}.parquet").facts for n in (0, 1)]  # type: ignore[union-attr]
    found = data["verification"]
    assert found["repaired"] == 2 and found["planned"] == sum(f["planned"] for f in facts)
    assert found["defects"] == dict(sum((collections.Counter(f["defects"]) for f in facts), collections.Counter()))
    assert len(found["cells"]) == 10
    assert found["found"]["timeout"] == found["defects"]["timeout"] + 2
    assert all(found["found"][k] == n for k, n in found["defects"].items() if k != "timeout")


def test_answers_that_reached_the_limit_are_counted(data: dict[str, Any], rows: pl.DataFrame) -> None:
    reached = rows.filter(pl.col("completion_tokens") == 64).height
    assert data["verification"]["at_max_new_tokens"] == reached > 0
    assert f"| answers at max_new_tokens | {reached} |" in report.markdown(data)
    assert f"which {reached} answers reached" in report.render_html(data)


def test_failures_are_told_before_and_after_repair_with_all_attempts(data: dict[str, Any], rows: pl.DataFrame) -> None:
    left = rows.filter(pl.col("status") == "timeout").height
    row = re.search(r'<td class="l" data-v="timeout">timeout</td>(.*?)</tr>', report.render_html(data))
    assert row and re.findall(r">([\d,]+)</td>", row[1]) == [str(left + 2), str(left)]
    assert f"timeout {left + 2} ({left} left)" in report.markdown(data)
    attempts = rows["attempts"].sum()
    assert f"{attempts} requests were sent for them, {attempts - rows.height} of them again" in report.render_html(data)


def test_what_a_repair_mended_to_the_last_is_told_too(data: dict[str, Any]) -> None:
    mended = data | {"failures": data["failures"] | {"total": 0, "by_kind": {}},
                     "verification": data["verification"] | {"defects": {}, "found": {"server_error": 3}}}
    page = report.render_html(mended)
    assert "None left: every request of the grid has an answer" in page and ">server_error</td>" in page
    assert "server_error 3 (0 left)" in report.markdown(mended)


def test_a_server_that_never_answered_is_among_the_servers(data: dict[str, Any]) -> None:
    of = {s["url"]: s for s in data["servers"]}
    assert (of["http://127.0.0.1:4"]["rows"], of["http://127.0.0.1:4"]["answered"]) == (0, False)
    assert of["http://127.0.0.1:1"]["answered"] and sum(s["rows"] for s in data["servers"]) == data["requests"]["rows"]
    page = report.render_html(data)
    assert page.count("never answered") == 1


def test_samples_are_kept_rows_of_all_sources_and_the_same_every_time(ctx: Context, data: dict[str, Any]) -> None:
    samples = data["samples"]
    assert [s["source"] for s in samples] == ["stories", "sums", "chat"] * 2
    assert len({s["prompt"] for s in samples}) == 6
    assert all(len(s["text"]) <= 602 for s in samples)
    assert all(s["worst"]["rating"] < s["rating"] for s in samples)
    assert report.gather(ctx)["samples"] == samples
    assert samples[0]["score"] == max(s["score"] for s in samples if s["source"] == "stories")


def test_a_run_in_progress_says_which_part_of_it_the_numbers_are_about(tmp_path: Path) -> None:
    ctx = make_run(tmp_path, prompts=6, heuristics=3, seeds=2)
    ctx.store.remove("verified/shard-0001.parquet")
    data = report.gather(ctx)
    assert data["funnel"]["planned"] == 6 * 3 * 2 and data["requests"]["rows"] == 3 * 3 * 2
    assert headline(data)[0].startswith("The run is not complete: 1 of 2 shards")


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_not_labelled_is_null_and_said(variants: dict[str, dict[str, Any]], name: str) -> None:
    data = variants[name]
    json.dumps(data, allow_nan=False)
    page, short = report.render_html(data), report.markdown(data)
    for text in (page, short):
        assert not re.search(r"\bnan\b|\binf\b|\bNone\b(?!( left)?: every request)", text)
    if name in ("quality only, one seed", "no labels"):
        assert "not labelled" in page
        assert all(h["embedding_entropy"] is None and h["pass_rate"] is None for h in data["heuristics"])
    if name == "no labels":
        assert data["funnel"]["kept"] is None and data["ranked_by"] is None
        assert all(h["kept"] is None for h in data["heuristics"])
    elif name not in ("everything failed", "nothing rated", "nothing scored"):
        assert sum(h["kept"] for h in data["heuristics"]) == data["funnel"]["kept"] > 0


def test_ranking_falls_back_to_the_label_there_is(variants: dict[str, dict[str, Any]]) -> None:
    assert variants["verifiers only"]["ranked_by"] == "pass_rate"
    assert variants["diversity only"]["ranked_by"] == "embedding_entropy"
    assert variants["pointwise"]["ranked_by"] == "rm_score" and variants["nothing scored"]["ranked_by"] is None
    assert "verifier pass rate" in headline(variants["verifiers only"])[0]


# -- page ----------------------------------------------------------------------------------------


class _Checker(html.parser.HTMLParser):
    """Fails on unbalanced tags."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: collections.Counter[str] = collections.Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", VARIANTS)
def test_the_page_is_whole_escaped_and_needs_nothing_from_outside(variants: dict[str, dict[str, Any]],
                                                                 name: str) -> None:
    page = report.render_html(variants[name])
    checker = _Checker()
    checker.feed(page)
    assert not checker.open
    assert checker.tags["script"] == 1 and "<script>alert" not in page
    assert not re.search(r"\b(src|href)\s*=|@import|url\(|<link|<iframe", page)
    if name == "whole":
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_text_that_wants_to_be_html_stays_text_wherever_it_comes_from(data: dict[str, Any]) -> None:
    nasty = '"><img src=x onerror=alert(1)>'

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        return nasty if isinstance(value, str) and key not in (
                "ranked_by", "name", "labels", "per", "prior_sd") else value

    poisoned = poison(data)
    for h in poisoned["heuristics"]:
        h["name"] += nasty
    for part in ("by_kind", "examples", "by_server"):
        poisoned["failures"][part] = {nasty: 1} if part != "examples" else {nasty: nasty}
    poisoned["drops"] = poisoned["judge"]["reasons"] = poisoned["unverified"] = {nasty: 3}
    poisoned["requests"]["dialects"] = poisoned["versions"] = poisoned["dataset"] = {nasty: 2}
    page = report.render_html(poisoned)
    checker = _Checker()
    checker.feed(page)
    assert not checker.open and checker.tags["img"] == 0 and checker.tags["script"] == 1
    assert page.count("&lt;img") > 20
    assert "<img" not in report.markdown(poisoned)


def test_a_long_leaderboard_shows_its_ends_and_folds_the_rest(tmp_path: Path) -> None:
    big = report.gather(make_run(tmp_path, heuristics=60, prompts=3, seeds=2, shards=1))
    page = report.render_html(big)
    board = page.split("<h2>Leaderboard</h2>")[1].split("</section>")[0]
    shown, folded = board.split("<details>")
    assert shown.count('class="iv"') == 40 and folded.count('class="iv"') == 60
    assert "20 more between" in shown and 'class="sortable"' in folded
    assert "<h2>Temperature and truncation</h2>" not in page  # 60 scattered heuristics are no grid


def test_the_headline_names_the_winner_its_rivals_and_its_cost(data: dict[str, Any]) -> None:
    lines = headline(data)
    best = data["heuristics"][0]
    rivals = sum(h["rating_high"] >= best["rating_low"] for h in data["heuristics"][1:])
    assert lines[0].startswith(f"{best['name']} has the highest mean rating")
    assert f"{rivals} of the other 11" in lines[0]
    most = max(data["heuristics"], key=lambda h: h["embedding_entropy"])
    assert most["name"] in lines[1]
    assert any("Read ratings with care" in line for line in lines)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    front = pareto(points)
    beaten = {p for p in points for q in points if q != p and q[0] >= p[0] and q[1] >= p[1]}
    assert {points[n] for n in front} == set(points) - beaten
    assert len({points[n] for n in front}) == len(front)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-6 * width <= t <= low + width + 1e-6 * width for t in found)


# -- picture and summary -------------------------------------------------------------------------


def test_the_picture_is_a_png_of_1200_by_500_for_every_run(variants: dict[str, dict[str, Any]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # no global state: any thread may draw
        for png in pool.map(report.plot_png, list(variants.values())):
            assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (1200, 500)


def test_the_summary_has_the_best_five_and_the_funnel(data: dict[str, Any]) -> None:
    text = report.markdown(data)
    for h in data["heuristics"][:5]:
        assert f"| {h['place']} | " in text and figure_text(h, "rating") in text
    assert "planned 432 \u2192 answered" in text and "Not kept: below_top_k" in text
    assert SCRIPT not in text


def test_a_cell_cannot_break_its_table() -> None:
    lines = markdown_table(("a", "b"), [("x | y\nz", "<b>")])
    assert lines == ["| a | b |", "|---|---|", "| x \\| y z | &lt;b> |"]


def test_numbers_read_well() -> None:
    assert [num(None), num(-0.001), num(-0.001, 2, True), num(-1.5), num(1234.5, 1)] == [
        "\u2013", "0.00", "+0.00", "\u22121.50", "1,234.5"]
    assert quantile([(5, 1), (1, 2), (3, 1)], 0.5) == 1 and quantile([], 0.5) is None
