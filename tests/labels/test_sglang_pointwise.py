"""A reward model on a real SGLang: its scores are those of transformers, and what its server would choke on is kept from
it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.prepare import check, open_run
from flows.servers import running
from tasks.context import Context, release
from tasks.core.config import RunConfig
from tasks.labels.quality.pointwise import RewardModel, Scored
from tasks.serving.client import ServerFacts
from tasks.serving.launch import launcher
from tests.fake_sglang import FakeSGLang
from tests.flows.conftest import winnow  # noqa: F401  (a fixture)
from tests.runs import build, make_config
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
CACHE = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama with a scalar head and random weights, so large that its scores differ in the first digit."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = make_tiny_model(tmp_path_factory.mktemp("reward") / "tiny-rm")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
                             "num_labels": 1}
    made = LlamaForSequenceClassification(LlamaConfig(**sizes, pad_token_id=300, eos_token_id=256)).float()
    made.score.weight.data.normal_(0, 1)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def state(tmp_path, monkeypatch) -> Iterator[Path]:
    folder = tmp_path / "state"
    monkeypatch.setenv("WINNOW_STATE_DIR", str(folder))
    yield folder
    launcher.stop_all(launcher.running(folder), 1)


def by_id(ctx: Context, table: str) -> dict[str, dict[str, Any]]:
    return {r["candidate_id"]: r for n in range(ctx.shards)
            for r in ctx.store.read(f"{table}/shard-{n:04d}.parquet").to_pylist()}


def theirs(model: Path, chats: list[tuple[str, str]]) -> list[float]:
    """What transformers makes of (prompt, answer): template, tokens and forward pass are its own."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    out = []
    for prompt, answer in chats:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
                                            tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            out.append(float(loaded(torch.tensor([ids])).logits[0, 0]))
    return out


def test_scores_are_those_of_transformers_through_servers_up_check_run_and_down(state, model, tmp_path, tiny_model,
                                                                                winnow):  # noqa: F811
    launch = {"device": "cpu", "dtype": "float32", "max_total_tokens": CACHE, "ready_timeout_s": 300}
    with FakeSGLang() as generator:
        raw = make_config(tmp_path, tiny_model, [], labels=["quality"],
                          servers={"generator": [{"url": generator.url}], "judge": [{"launch": launch}]},
                          quality={"method": "pointwise", "model": {"path": str(model)}})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        code, said = winnow("servers", "up", str(tmp_path / "run.yaml"))
        assert code == 0, said
        (record,) = launcher.running(state)
        assert record.command.count("--is-embedding") == 1
        code, said = winnow("servers", "check", str(tmp_path / "run.yaml"))
        assert code == 0 and "would be reused" in said, said
        # the same server is no generator, nor a judge of pairs
        code, said = winnow("servers", "check", str(tmp_path / "run.yaml"), "--set",
                            f"servers.generator.0.url={record.url}", "--set", f"model.path={model}")
        assert code == 2 and "kind of model" in said and "start it with a model that generates" in said

        ctx = build(raw, ["generate", "verify", "quality"])
        assert [s["how"] for s in ctx.raw["servers"]["judge"]] == ["reused"]
        prompts = {p["prompt_id"]: p["prompt"] for p in ctx.store.read("prompts.parquet").to_pylist()}
        rows = by_id(ctx, "labels/quality")
        candidates = by_id(ctx, "verified")
        expected = theirs(model, [(prompts[c["prompt_id"]], c["text"]) for c in candidates.values()])
        assert len(rows) == 40 and max(expected) - min(expected) > 1
        assert [rows[c]["rm_score"] for c in candidates] == pytest.approx(expected, abs=1e-4)
        release(ctx.url)

        long_and_short(raw | {"run": "long", "quality": raw["quality"] | {"cache": "off"}}, model)
        assert [r.url for r in launcher.running(state)] == [record.url]
        assert winnow("servers", "down", str(tmp_path / "run.yaml"))[0] == 0 and not launcher.running(state)


def long_and_short(raw: dict, model: Path) -> None:
    """A text that the server's cache can't hold is refused here, for it would block the server; others in its batch
    are scored, and the server serves on."""
    texts = ["short", "x" * (CACHE + 200), *(f"fine {n}" for n in range(30))]
    ctx = open_run(check(RunConfig.model_validate(raw), {}))
    try:
        with running(ctx, print) as served:
            found = []
            for _ in range(2):
                judge = RewardModel(served, 0)
                found = served.loop.run(lambda judge=judge: judge.score([{"role": "user", "content": "Why?"}], texts))
                judge.kept.close(done=True)
            (facts,) = [f for _, _, f in served.servers_seen("judge")]
            assert isinstance(facts, ServerFacts) and not facts.generates
    finally:
        release(ctx.url)
    assert found[1].score is None and str(found[1].reason).startswith("rejected: ")
    rest = [t for t in texts if len(t) < 99]
    assert [f.score for f in found if f != found[1]] == pytest.approx(theirs(model, [("Why?", t) for t in rest]), abs=1e-4)
    assert all(isinstance(f, Scored) for f in found)
