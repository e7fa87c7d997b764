"""A real SGLang server on the CPU, with the demo's model: it starts, repeats itself to the bit, and goes away."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.serving import launcher
from tasks.serving.launcher import LaunchSpec, ServerRecord
from tasks.serving.sglang_cpu import ensure_demo_model

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
ROOT = Path(launcher.__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model: the one that is there, or a fresh export (WINNOW_DEMO_MODEL names another place)."""
    place = Path(os.environ.get("WINNOW_DEMO_MODEL", ROOT / "data/models/SmolLM2-135M-Instruct"))
    if not (place / "config.json").exists():
        place = tmp_path_factory.mktemp("models") / "SmolLM2"
    return ensure_demo_model(place)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRecord]:
    asked = LaunchSpec(model=str(model), device="cpu", threads=1, max_total_tokens=16384, ready_timeout_s=300)
    record = launcher.start(asked, tmp_path_factory.mktemp("servers"), leashed=True)
    yield record
    tree = [record.pid, *(p.pid for p in psutil.Process(record.pid).children(recursive=True))]
    assert len(tree) >= 4  # leash, server, scheduler, detokenizer
    launcher.stop(record)
    assert not any(psutil.pid_exists(pid) for pid in tree)


def post(server: ServerRecord, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        text = response.read()
    return json.loads(text) if text.startswith(b"{") else text


def request(i: int, **params: Any) -> dict[str, Any]:
    """A request of its own, one of several kinds: plain, cut in four ways, greedy."""
    rng = random.Random(i)
    kinds: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9},
                                   {"temperature": 0.0}]
    ids = [1, *range(200, 230), *(rng.randrange(100, 40000) for _ in range(rng.randrange(1, 90)))]
    return {"input_ids": ids, "return_logprob": True,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True,
                                "sampling_seed": rng.getrandbits(31)} | kinds[i % len(kinds)] | params}


def answer(server: ServerRecord, body: dict[str, Any]) -> list[tuple[int, float]]:
    meta = post(server, "/generate", body)["meta_info"]
    return [(token, logprob) for logprob, token, _ in meta["output_token_logprobs"]]


def test_the_demo_model_has_what_chat_needs_and_is_exported_once(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False,
                                         add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode("So — naïve 日本\n\n  x=1;")) == "So — naïve 日本\n\n  x=1;"
    settings = json.loads((model / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert ensure_demo_model(model) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before


def test_the_same_request_gives_the_same_bits_alone_and_in_any_company(server: ServerRecord) -> None:
    requests = [request(i) for i in range(12)]
    alone = [answer(server, r) for r in requests]
    order = random.Random(0).sample(range(12), 12)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = dict(zip(order, pool.map(lambda i: answer(server, requests[i]), order), strict=True))
        post(server, "/flush_cache", {})
        uncached = list(pool.map(lambda r: answer(server, r), requests[:5]))
    for i, want in enumerate(alone):
        assert together[i] == want, f"request {i} depends on its neighbours"
    assert uncached == alone[:5], "what the cache holds changes the answer"
    assert len({tuple(token for token, _ in row) for row in alone}) == 12


def test_another_seed_gives_another_text(server: ServerRecord) -> None:
    assert answer(server, request(0)) != answer(server, request(0, sampling_seed=1))


def test_prefixes_are_cached_under_deterministic_inference(server: ServerRecord) -> None:
    body = request(100)
    answer(server, body)
    assert post(server, "/generate", body)["meta_info"]["cached_tokens"] >= 30


def test_cuts_hold(server: ServerRecord) -> None:
    """With top_k 1 sampling is greedy; with min_p near 1 too, and a seed beside min_p does not end the server."""
    greedy = [token for token, _ in answer(server, request(5, max_new_tokens=4))]
    for cut in ({"top_k": 1}, {"min_p": 0.9999}, {"top_p": 1e-6}):
        assert [token for token, _ in answer(server, request(5, temperature=1.0, max_new_tokens=4, **cut))] == greedy


def test_the_server_says_that_it_honours_seeds_and_processors(server: ServerRecord) -> None:
    with urllib.request.urlopen(server.url + "/server_info", timeout=10) as response:
        info = json.load(response)
    assert info["enable_deterministic_inference"] and info["enable_custom_logit_processor"]
    assert info["device"] == "cpu" and not info["disable_radix_cache"]
