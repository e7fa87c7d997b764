"""Scores of a reward model over real HTTP: batches, what is sent, and one bad text that must not spoil the others."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.prepare import check, open_run
from flows.servers import running
from tasks.context import release
from tasks.core.config import ModelRef, RunConfig
from tasks.core.errors import InputError, UnreachableError
from tasks.core.tokenizer import load_tokenizer
from tasks.labels.quality.pointwise import (
    BATCH,
    RewardModel,
    Scored,
    conversation,
    no_reward_model,
    read,
    render,
)
from tests import fake_answers
from tests.fake_sglang import FakeSGLang, Fault
from tests.runs import build, make_config
from tests.tiny_model import TEMPLATE, make_tiny_model

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
TEXTS = [f"because {n}" for n in range(40)]
BAD = "because 7"


def ids_of(prompt: str, answer: str) -> list[int]:
    """The exchange as the byte tokenizer has it, put together by hand."""
    def turn(role: str, text: str) -> list[int]:
        return [257, *f"{role}\n{text}".encode(), 256, ord("\n")]

    return [*turn("user", prompt), *turn("assistant", answer)]


def right(texts: Sequence[str]) -> list[Scored]:
    return [Scored(fake_answers.score(ids_of("Why?", text)), None) for text in texts]


def has(payload: dict[str, Any], text: str) -> bool:
    return ids_of("Why?", text) in payload["input_ids"]


def on(text: str, fault: str) -> Fault:
    """The fault for every batch with this text."""
    return lambda _, payload: fault if has(payload, text) else None


def config(folder: Path, model: Path, judges: Sequence[FakeSGLang], generator: str, **changes: Any) -> dict[str, Any]:
    quality = {"method": "pointwise", "max_prompt_tokens": 1600} | changes.pop("quality", {})
    servers = {"generator": [{"url": generator}], "judge": [{"url": j.url, "max_in_flight": 4} for j in judges]}
    limits = {"attempts": 3, "request_timeout_s": 5, "wait_for_servers_s": 3} | changes.pop("limits", {})
    return make_config(folder, model, [], servers=servers, quality=quality, labels=["quality"], limits=limits, **changes)


Score = Callable[..., list[Scored]]


@pytest.fixture
def scoring(tmp_path, tiny_model) -> Iterator[Callable[..., contextlib.AbstractContextManager[Score]]]:
    """`with scoring(judge, ...) as score: score(texts)`; a model of its own for each call."""
    @contextlib.contextmanager
    def opened(*judges: FakeSGLang, **changes: Any) -> Iterator[Score]:
        with FakeSGLang() as generator:
            ctx = open_run(check(RunConfig.model_validate(config(tmp_path, tiny_model, judges, generator.url, **changes)),
                                 {}))
            try:
                with running(ctx, lambda _: None) as served:
                    def score(texts: Sequence[str], messages: Any = PROMPT, change: Any = None) -> list[Scored]:
                        model = RewardModel(served, 0)
                        if change:
                            change(model)
                        try:
                            return served.loop.run(lambda: model.score(messages, texts))
                        finally:
                            score.calls, score.spared = model.kept.calls, model.kept.spared  # type: ignore[attr-defined]
                            model.kept.close(done=False)
                    yield score
            finally:
                release(ctx.url)

    yield opened


@pytest.fixture
def judge() -> Iterator[FakeSGLang]:
    with FakeSGLang(is_embedding=True) as server:
        yield server


# --- what is sent ---

def test_texts_go_in_batches_each_once_and_come_back_in_order(judge, scoring):
    with scoring(judge) as score:
        twice = [*TEXTS, *TEXTS[:5], TEXTS[0]]
        assert score(twice) == right(twice)
    sizes = [len(r["input_ids"]) for r in judge.requests]
    assert sum(sizes) == len(TEXTS) and max(sizes) == BATCH and len(sizes) == 3
    rids = [rid for r in judge.requests for rid in r["rid"]]
    assert len(set(rids)) == len(TEXTS) and {len(rid) for rid in rids} == {32}


def test_the_model_reads_the_exchange_and_the_answer_without_the_system_turn(judge, scoring):
    messages = [*PROMPT, {"role": "assistant", "content": "Why not?"}, {"role": "user", "content": "Say."}]
    with scoring(judge, generation={"judge": {"system_prompt": "Score it."}}) as score:
        score(["so"], messages)
    (sent,) = judge.requests[0]["input_ids"]
    said = "".join({256: "<|im_end|>", 257: "<|im_start|>"}.get(i) or chr(i) for i in sent)
    assert said == ("<|im_start|>system\nScore it.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
                    "Why not?<|im_end|>\n<|im_start|>user\nSay.<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n")


def test_a_special_tokens_text_in_an_answer_ends_no_turn(judge, scoring):
    with scoring(judge) as score:
        score(["a<|im_end|>b"])
    (sent,) = judge.requests[0]["input_ids"]
    assert sent == ids_of("Why?", "a< |im_end|>b") and sent.count(256) == 2


def test_a_text_that_is_too_long_loses_its_middle_and_a_short_prompt_nothing(tiny_model):
    tokenizer = load_tokenizer(ModelRef(path=str(tiny_model)))
    whole = render(tokenizer, None, conversation(PROMPT, "x" * 300), None)
    assert whole == ids_of("Why?", "x" * 300)
    cut = bytes(i for i in render(tokenizer, None, conversation(PROMPT, "b" + "x" * 300 + "e"), 120) if i < 256).decode()
    assert len(cut) <= 118 and "Why?" in cut and "bxxx" in cut and "xxxe" in cut and " [...] " in cut
    with pytest.raises(ValueError, match="leave"):
        render(tokenizer, None, conversation(PROMPT, "x" * 300), 30)


def test_a_prompt_in_two_groups_is_asked_once_and_a_restart_asks_nothing(judge, scoring):
    with scoring(judge) as score:
        score(TEXTS)
        assert score.calls == len(TEXTS)
        asked = len(judge.requests)
        assert score(TEXTS[:9]) == right(TEXTS[:9])
        assert (len(judge.requests), score.calls, score.spared) == (asked, 9, 0)  # found again, and this run's own
        judge.fault = on(BAD + "!", "400")
        assert score([*TEXTS[:3], BAD + "!"])[3].reason.startswith("rejected")  # type: ignore[union-attr]
        judge.fault = None
        assert score([BAD + "!"])[0].score is not None  # a failure is not kept


# --- one bad text ---

@pytest.mark.parametrize(("fault", "reason"), [
    ("400", "rejected: HTTP 400"), ("500", "server_error"), ("wrong_count", "bad_response: not an answer of SGLang"),
    ("garbage", "bad_response"), ("truncate", "bad_response"), ("abort", "aborted"), ("reset", "poison"),
])
def test_a_text_that_spoils_its_batch_is_alone_without_a_score(judge, scoring, fault, reason):
    judge.fault = on(BAD, fault)
    with scoring(judge) as score:
        found = dict(zip(TEXTS, score(TEXTS), strict=True))
    bad = found.pop(BAD)
    assert bad.score is None and str(bad.reason).startswith(reason)
    assert list(found.values()) == right([t for t in TEXTS if t != BAD])


def test_a_text_that_hangs_takes_no_other_along_nor_longer_than_the_deadline(judge, scoring):
    judge.fault = on(BAD, "hang")
    with scoring(judge, limits={"request_timeout_s": 0.4, "request_deadline_s": 2}) as score:
        began = time.monotonic()
        found = dict(zip(TEXTS, score(TEXTS), strict=True))
        assert time.monotonic() - began < 5
    # 16, 8, 4, 2 and 1 texts: the attempts of the larger batches are the text's own
    assert [len(r["input_ids"]) for r in judge.requests if has(r, BAD)] == [16, 8, 4, 2, 1]
    assert str(found.pop(BAD).reason).startswith("timeout")
    assert list(found.values()) == right([t for t in TEXTS if t != BAD])


def test_a_text_that_kills_its_server_is_given_up_soon_and_no_other_is_lost(judge, scoring):
    judge.fault, judge.crash_down_s = on(BAD, "crash"), 0.5
    with scoring(judge, limits={"wait_for_servers_s": 20}) as score:
        found = dict(zip(TEXTS, score(TEXTS), strict=True))
    assert judge.crashes in (2, 3)  # 3 where it was up again before it was asked: the first looked like a reset
    bad = found.pop(BAD)
    assert bad.score is None and str(bad.reason).startswith("poison")
    assert list(found.values()) == right([t for t in TEXTS if t != BAD])


@pytest.mark.parametrize("fault", ["500", "garbage", "wrong_count", "nan", "abort", "wrong_rid", "truncate", "503"])
def test_faults_that_pass_cost_no_score(judge, scoring, fault):
    judge.fault = lambda n, _: fault if n % 3 == 1 else None
    with scoring(judge, limits={"attempts": 4}) as score:
        assert score(TEXTS) == right(TEXTS)


def test_answers_in_another_order_are_nobodys(judge, scoring):
    judge.fault = lambda _, payload: "wrong_rid" if len(payload["input_ids"]) > 1 else None
    with scoring(judge) as score:
        assert score(TEXTS[:4]) == right(TEXTS[:4])
    assert sum(len(r["input_ids"]) == 1 for r in judge.requests) == 4


def test_a_score_that_is_no_number_is_none(judge, scoring):
    judge.fault = lambda _, payload: "nan"
    with scoring(judge) as score:
        assert [(s.score, str(s.reason).partition(":")[0]) for s in score(TEXTS[:2])] == [(None, "bad_response")] * 2


@pytest.mark.parametrize(("values", "reason"), [
    ([1.5, 2.0], "several_labels"), ([], "bad_response"), (None, "bad_response"), (3.5, "bad_response"),
    ([None], "not_finite"), (["1"], "not_finite"), ([float("nan")], "not_finite"), ([float("inf")], "not_finite"),
    ([True], "not_finite"), ([-999.0], None), ([0], None),
])
def test_only_one_finite_number_is_a_score(values, reason):
    found = read(values)
    assert (found.reason or "").partition(":")[0] == (reason or "")
    assert found.value == (None if reason else float(values[0]))


def test_a_model_of_several_labels_scores_nothing_and_is_asked_once(judge, scoring, monkeypatch):
    def five(payload: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**a, "embedding": a["embedding"] * 5} for a in answers(payload)]

    answers = fake_answers.classify
    monkeypatch.setattr(fake_answers, "classify", five)
    with scoring(judge) as score:
        assert score(TEXTS[:3]) == [Scored(None, "several_labels: the model gives 5 numbers a text, a reward model gives "
                                                 "one")] * 3
    assert len(judge.requests) == 1


def test_what_would_end_or_block_a_server_is_not_sent(scoring):
    long = "y" * 300
    with FakeSGLang(is_embedding=True, max_req_input_len=200) as judge, scoring(judge) as score:
        found = score([*TEXTS[:5], long])
        assert found[:5] == right(TEXTS[:5])
        assert str(found[5].reason).startswith("rejected: ") and "cache" in str(found[5].reason)
        assert not any(has(r, long) for r in judge.requests)
        sent = len(judge.requests)
        outside = score([TEXTS[6]], change=lambda model: setattr(model, "_vocabulary", 200))
        assert str(outside[0].reason).startswith("not_sent: token id 257") and len(judge.requests) == sent


# --- servers ---

@pytest.mark.parametrize("change", [{"model_path": "another"}, {"is_embedding": False}])
def test_a_server_that_comes_back_as_another_gives_no_score(judge, scoring, change):
    def fault(n: int, _: Any) -> str | None:
        if n == 1:
            judge.restart(**change)
        return "reset" if n == 1 else None

    judge.fault = fault
    with scoring(judge, limits={"wait_for_servers_s": 1}) as score:
        with pytest.raises(UnreachableError, match=r"another|kind of model|generates"):
            score(TEXTS)
        assert score.calls <= BATCH  # type: ignore[attr-defined]  # what came before the change
        judge.fault = None
        judge.restart(model_path="tiny", is_embedding=True)
    with scoring(judge) as score:
        assert score(TEXTS) == right(TEXTS)


def test_two_servers_share_the_texts_and_one_that_dies_is_missed_by_none(judge, scoring):
    with FakeSGLang(is_embedding=True) as second, scoring(judge, second) as score:
        second.fault = lambda n, _: "crash" if n == 1 else None
        texts = [f"so {n}" for n in range(200)]
        assert score(texts) == [Scored(fake_answers.score(ids_of("Why?", t)), None) for t in texts]
        assert judge.requests and second.requests


@pytest.mark.parametrize(("server", "method", "words"), [
    ({}, "pointwise", "kind of model a reward model one that generates start it with a reward model and --is-embedding"),
    ({"is_embedding": True}, "tournament", "kind of model one that generates an embedding or reward model start it with "
                                           "a model that generates, without --is-embedding"),
])
def test_a_judge_of_the_other_kind_is_refused_with_the_mend(tmp_path, tiny_model, server, method, words):
    with FakeSGLang() as generator, FakeSGLang(**server) as judge:
        raw = config(tmp_path, tiny_model, [judge], generator.url, quality={"method": method})
        with pytest.raises(InputError) as refused:
            build(raw, ["generate"])
        assert words in " ".join(str(refused.value).split())
        assert not judge.requests


def test_servers_check_knows_a_reward_model(tmp_path, tiny_model):
    from flows.probing import probe

    with FakeSGLang() as generator, FakeSGLang(is_embedding=True) as judge:
        raw = config(tmp_path, tiny_model, [judge], generator.url)
        assert [p.state for p in probe(RunConfig.model_validate(raw), [])] == ["as asked for"] * 2
        raw["servers"]["judge"][0]["url"] = generator.url
        found = probe(RunConfig.model_validate(raw), [])
        assert [(p.state, p.refused) for p in found] == [("as asked for", False), ("differs", True)]


# --- the labels ---

def test_labels_are_scores_and_nothing_is_rated(tmp_path, tiny_model):
    with FakeSGLang() as generator, FakeSGLang(is_embedding=True) as judge:
        raw = config(tmp_path, tiny_model, [judge], generator.url)
        ctx = build(raw, ["generate", "verify", "quality"])
        prompts = {p["prompt_id"]: p for p in ctx.store.read("prompts.parquet").to_pylist()}
    rows = [r for n in range(ctx.shards) for r in ctx.store.read(f"labels/quality/shard-{n:04d}.parquet").to_pylist()]
    texts = {r["candidate_id"]: r for n in range(ctx.shards)
             for r in ctx.store.read(f"verified/shard-{n:04d}.parquet").to_pylist()}
    assert len(rows) == 40
    for row in rows:
        candidate = texts[row["candidate_id"]]
        expected = fake_answers.score(ids_of(prompts[candidate["prompt_id"]]["prompt"], candidate["text"]))
        assert (row["rm_score"], row["rm_reason"], row["rating"]) == (expected, None, None)
    assert not judge.judgements and not judge.generations and not generator.classifications
    distinct = {(c["prompt_id"], c["text"]) for c in texts.values()}
    assert sum(len(r["input_ids"]) for r in judge.classifications) == len(distinct)


# --- at the start ---

def test_the_generators_cannot_be_the_reward_model(tmp_path, tiny_model):
    raw = config(tmp_path, tiny_model, [], "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"quality.method: pointwise .* servers.judge: \[\{launch"):
        check(RunConfig.model_validate(raw), {})
    check(RunConfig.model_validate(raw | {"labels": []}), {}).prompts.close()


@pytest.mark.parametrize(("architecture", "more", "why"), [
    ("LlamaForCausalLM", {}, "it is a LlamaForCausalLM"),
    ("LlamaForSequenceClassification", {"id2label": {str(n): f"L{n}" for n in range(5)}}, "it gives 5 numbers"),
    ("LlamaForSequenceClassification", {"id2label": {"0": "L"}}, None),
    ("Qwen2ForRewardModel", {}, None),
])
def test_a_model_without_a_scalar_head_is_told_by_its_config(tmp_path, architecture, more, why):
    folder = make_tiny_model(tmp_path / "rm")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": [architecture]} | more))
    found = no_reward_model(ModelRef(path=str(folder)))
    assert (found is None) if why is None else str(found).startswith(why)
    with FakeSGLang(model_path="rm", is_embedding=True) as judge:
        raw = config(tmp_path, make_tiny_model(tmp_path / "tiny"), [judge], "http://127.0.0.1:1",
                     quality={"model": {"path": str(folder)}})
        if why:
            with pytest.raises(InputError, match="is no reward model"):
                check(RunConfig.model_validate(raw), {})
            raw["servers"]["judge"][0]["expect"] = {"flags": {"json-model-override-args": "{}"}}
        check(RunConfig.model_validate(raw), {}).prompts.close()


def test_a_template_that_leaves_the_answer_out_is_refused(tmp_path, tiny_model):
    template = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")
    raw = config(tmp_path, tiny_model, [], "http://127.0.0.1:1", generation={"judge": {"chat_template": template}})
    raw["servers"]["judge"] = [{"url": "http://127.0.0.1:1"}]
    with pytest.raises(InputError, match="it leaves the assistant's turn out"):
        check(RunConfig.model_validate(raw), {})
