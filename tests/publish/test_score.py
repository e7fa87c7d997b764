from __future__ import annotations

import math
import statistics

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.config import Scoring
from tasks.publish.score import LABELS, Moments, score_shard

number = st.one_of(st.none(), st.floats(-5, 5), st.sampled_from([0.0, 1.0]))
candidate = st.fixed_dictionaries({
    "prompt_id": st.sampled_from(["p", "q"]), "seed": st.sampled_from([0, 1]), "usable": st.sampled_from([True, True, False]),
    "rating": number, "rm_score": number, "embedding_entropy": number, "self_bleu": number,
    "reward": st.one_of(st.none(), st.sampled_from([0.0, 1.0]))})
scorings = st.builds(lambda q, d, c, k, per, bad: Scoring.model_validate({
    "weights": {"quality": q, "diversity": d, "correctness": c}, "top_k": k, "per": per, "incorrect": bad}),
    *(st.sampled_from([0, 0.1, 0.9]) for _ in range(3)), st.integers(1, 3),
    st.sampled_from([["prompt"], ["prompt", "seed"]]), st.sampled_from(["drop", "keep"]))


def stats_of(rows: list[dict]) -> dict[str, Moments]:
    out = {}
    for name in LABELS:
        values = [r[name] for r in rows if r["usable"] and r[name] is not None]
        mean = statistics.fmean(values) if values else 0.0
        out[name] = Moments(len(values), mean, math.fsum((v - mean) ** 2 for v in values))
    return out


def reference(rows: list[dict], scoring: Scoring) -> dict[str, tuple]:
    """The definition, row by row: (score, rank, kept, dropped) by candidate."""
    stats = stats_of(rows)

    def z(row: dict, name: str) -> float | None:
        if row[name] is None:
            return None
        return (row[name] - stats[name].mean) / stats[name].sd if stats[name].sd else 0.0

    out, groups = {}, {}
    for row in rows:
        entropy, bleu = z(row, "embedding_entropy"), z(row, "self_bleu")
        diverse = [v for v in (entropy, None if bleu is None else -bleu) if v is not None]
        rated = any(r["usable"] and r["rating"] is not None for r in rows)
        parts = [(scoring.weights.quality, z(row, "rating" if rated else "rm_score")), (scoring.weights.correctness, z(row, "reward")),
                 (scoring.weights.diversity, statistics.fmean(diverse) if diverse else None)]
        there = [(w, v) for w, v in parts if v is not None]
        total = sum(w for w, _ in there)
        score = sum(w * v for w, v in there) / total if total else None
        dropped = None
        if not row["usable"]:
            dropped = "unusable"
        elif scoring.incorrect == "drop" and row["reward"] == 0:
            dropped = "incorrect"
        elif score is None:
            dropped = "unlabelled"
        out[row["candidate_id"]] = [score, None, False, dropped]
        if dropped is None:
            key = (row["prompt_id"], row["seed"]) if "seed" in scoring.per else row["prompt_id"]
            groups.setdefault(key, []).append((score, row["candidate_id"]))
    for members in groups.values():
        for rank, (_, name) in enumerate(sorted(members, key=lambda m: (-m[0], m[1])), 1):
            kept = rank <= scoring.top_k
            out[name][1:] = [rank, kept, None if kept else "below_top_k"]
    return {k: tuple(v) for k, v in out.items()}


def frame_of(rows: list[dict]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"candidate_id": pl.String, "prompt_id": pl.String, "seed": pl.Int64,
                                      "usable": pl.Boolean, **dict.fromkeys(LABELS, pl.Float64)})


@given(st.lists(candidate, min_size=1, max_size=14), scorings)
def test_scores_equal_the_definition_row_by_row(rows, scoring):
    # ratings on a grid, so that real ties occur and rounding makes none
    rows = [r | {"candidate_id": f"c{n:02d}"} | {k: None if r[k] is None else round(r[k] * 2) / 2 for k in LABELS}
            for n, r in enumerate(rows)]
    expected = reference(rows, scoring)
    made = score_shard(frame_of(rows), stats_of(rows), scoring)
    assert made["candidate_id"].to_list() == [r["candidate_id"] for r in rows]
    for row in made.to_dicts():
        score, rank, kept, dropped = expected[row["candidate_id"]]
        assert row["score"] == (None if score is None else pytest.approx(score, abs=1e-9))
        assert (row["dropped"] is None) == row["kept"]
        if dropped in ("unusable", "incorrect", "unlabelled"):
            assert (row["rank"], row["kept"], row["dropped"]) == (None, False, dropped)
        else:
            ties = [c for c, e in expected.items() if e[0] is not None and abs(e[0] - score) < 1e-9]
            assert len(ties) > 1 or (row["rank"], row["kept"], row["dropped"]) == (rank, kept, dropped)


def test_ties_are_broken_by_id_and_missing_labels_renormalise():
    base = {"prompt_id": "p", "seed": 0, "usable": True, "rm_score": None, "embedding_entropy": None, "self_bleu": None}
    rows = [base | {"candidate_id": "b", "rating": 1.0, "reward": None}, base | {"candidate_id": "a", "rating": 1.0, "reward": None},
            base | {"candidate_id": "c", "rating": -1.0, "reward": 1.0}, base | {"candidate_id": "d", "rating": -1.0, "reward": 0.0}]
    made = score_shard(frame_of(rows), stats_of(rows), Scoring()).to_dicts()
    by_id = {r["candidate_id"]: r for r in made}
    assert [by_id[c]["rank"] for c in "abcd"] == [1, 2, 3, None]
    assert by_id["a"]["score"] == pytest.approx(1.0)  # quality alone, at full weight
    assert by_id["c"]["score"] == pytest.approx((0.9 * -1 + 0.9 * 1) / 1.8)
    assert by_id["d"]["dropped"] == "incorrect"


@given(st.lists(st.lists(st.floats(-100, 100), max_size=6), max_size=5))
def test_moments_of_parts_join_to_those_of_the_whole(parts):
    joined = sum((Moments.of(pl.Series(p, dtype=pl.Float64)) for p in parts), Moments())
    values = [v for p in parts for v in p]
    assert joined.n == len(values)
    if values:
        assert joined.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
        assert joined.sd == pytest.approx(statistics.pstdev(values), abs=1e-6)
