"""The sampling mask as a real SGLang server records it: the CPU, SmolLM2-135M, without deterministic inference."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.real_sglang import launched
from tests.flows.test_sglang_run import small, verified
from tests.runs import build

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1200)]
HEAT = {"name": "temperature", "params": {"temperature": 0.8}}
CUTS = {"k 20": {"top_k": 20}, "k 4096": {"top_k": 4096}, "greedy": {"top_k": 1}, "p": {"top_p": 0.9},
        "k p": {"top_k": 20, "top_p": 0.9}}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[str]:
    with launched(model, tmp_path_factory.mktemp("servers"), dtype="bfloat16", max_total_tokens=32768,
                  deterministic=False) as url:
        yield url


def sampled(folder: Path, url: str, run: str, **generation: Any) -> dict[str, list[dict[str, Any]]]:
    """Verified rows by heuristic."""
    raw = small(folder, url, run, labels=[], seeds=[0, 1])
    file = folder / "heuristics.yaml"
    file.write_text(json.dumps({"sampling_pipelines": [
        {"name": name, "processors": [HEAT, *({"name": n, "params": {n: v}} for n, v in cuts.items())]}
        for name, cuts in CUTS.items()]}))
    raw["heuristics"] = {"files": [str(file)]}
    raw["servers"]["generator"][0]["expect"] = {"dtype": "bfloat16", "deterministic": False}
    raw["generation"]["generator"] |= {"sampling_mask": True} | generation
    ctx = build(raw, ["generate", "verify"])
    rows = verified(ctx)
    assert [(r["status"], r["error"]) for r in rows] == [("ok", None)] * (5 * 2 * len(CUTS))
    return {h.name: [r for r in rows if r["heuristic_id"] == h.id] for h in ctx.heuristics}


def check(row: dict[str, Any], sizes: range) -> None:
    assert len(row["kept_ids"]) == len(row["kept_logprobs"]) == len(row["output_ids"]) == len(row["output_logprobs"])
    assert row["seed_effective"] is False and row["dialect"] == "joint"
    for token, kept, behaviour, full in zip(row["output_ids"], row["kept_ids"], row["kept_logprobs"],
                                            row["output_logprobs"], strict=True):
        assert token in kept and len(kept) in sizes
        assert full - 1e-3 <= behaviour <= 1e-5  # the rest was cut, so what is kept is likelier


def test_what_the_engine_kept_is_recorded_for_every_native_top_k(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = sampled(tmp_path, server, "masked", max_new_tokens=24)
    assert "3 heuristics (greedy, k 20, k 4096) of 5, on 1 of 1 servers" in caplog.text
    # fewer than k where rounding drives the mass before the tail above top_p 1.0: a peaked step kept 10 of 20
    for row in found["k 20"]:
        check(row, range(1, 21))
    for row in found["k 4096"]:
        check(row, range(1, 4097))
    assert max(len(kept) for row in found["k 20"] for kept in row["kept_ids"]) == 20
    for row in found["greedy"]:
        check(row, range(1, 2))
        assert row["kept_logprobs"] == [0.0] * len(row["output_ids"])
    for name in ("p", "k p"):
        assert all(r["kept_ids"] is None and r["kept_logprobs"] is None for r in found[name])


def test_masks_and_tokens_agree_where_a_text_ends_the_answer(server, tmp_path):
    found = sampled(tmp_path, server, "stopped", stop=[".", " the"], max_new_tokens=64)
    for row in found["k 20"]:
        check(row, range(1, 21))
    assert {r["finish_reason"] for r in found["k 20"]} >= {"stop"}
