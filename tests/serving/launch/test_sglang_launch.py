"""A real SGLang server on the CPU, with the demo's model: it starts, repeats itself to the bit, and goes away."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core.heuristics import Heuristic, Processor
from tasks.serving.compile import compile_heuristic
from tasks.serving.launch import launcher
from tasks.serving.launch.launcher import LaunchSpec, ServerRecord
from tasks.serving.sglang_cpu import ensure_demo_model
from tests.asked import generation

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
ROOT = Path(launcher.__file__).resolve().parents[3]


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


CUTS = [("temperature", 0.8), ("top_k", 20), ("top_p", 0.8), ("min_p", 0.1), ("typical", 0.9), ("epsilon", 1e-3),
        ("eta", 1e-3)]


def request(i: int, *chain: tuple[str, float], seed: int | None = None, max_new_tokens: int = 12) -> dict[str, Any]:
    """A request as the pipeline compiles it: a prompt of its own, by default one of the seven processors."""
    rng = random.Random(i)
    ids = [1, *range(200, 230), *(rng.randrange(100, 40000) for _ in range(rng.randrange(1, 90)))]
    drawn = rng.getrandbits(61)
    heuristic = Heuristic("h", tuple(Processor(n, v) for n, v in chain or (CUTS[i % len(CUTS)],)))
    compiled = compile_heuristic(heuristic, honours_seeds=True)
    params = compiled.sampling_params(generation(max_new_tokens=max_new_tokens), drawn if seed is None else seed)
    return {"input_ids": ids, "return_logprob": True, "sampling_params": params | {"ignore_eos": True},
            **({"custom_logit_processor": compiled.processor} if compiled.processor else {})}


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
    assert answer(server, request(0)) != answer(server, request(0, seed=1))


def test_prefixes_are_cached_under_deterministic_inference(server: ServerRecord) -> None:
    body = request(100)
    answer(server, body)
    assert post(server, "/generate", body)["meta_info"]["cached_tokens"] >= 30


def test_each_cut_alone_and_in_order_is_obeyed(server: ServerRecord) -> None:
    """Cuts so tight that one token is left give the likeliest token; after heat, the order decides."""
    # a prompt whose likeliest tokens are the likeliest alone: bf16 logits tie, and top_k 1 keeps ties
    first = {i: answer(server, request(i, ("top_k", 1), max_new_tokens=4)) for i in range(12)}
    i, best = next((i, got) for i, got in first.items() if all(logprob > -1e-3 for _, logprob in got))
    greedy = [token for token, _ in best]
    for chain in ([("top_p", 1e-6)], [("min_p", 1.0)], [("epsilon", 0.999)], [("top_k", 1), ("temperature", 50.0)],
                  [("temperature", 1e-3)], [("top_k", 40), ("top_p", 1e-6)]):
        got = answer(server, request(i, *chain, max_new_tokens=4))
        assert [token for token, _ in got] == greedy, chain
    hot = answer(server, request(i, ("temperature", 50.0), ("min_p", 0.999999), max_new_tokens=4))
    assert [token for token, _ in hot] == greedy
    wide = answer(server, request(i, ("temperature", 50.0), ("top_k", 40), max_new_tokens=4))
    assert [token for token, _ in wide] != greedy  # forty tokens, all about equally likely
    assert all(abs(logprob + math.log(40)) < 1 for _, logprob in wide)


def test_a_bad_processor_parameter_is_refused_and_the_server_lives(server: ServerRecord) -> None:
    body = request(5, ("top_p", 0.9))
    body["sampling_params"]["custom_params"] = {"winnow": ["top_q", 0.9, 1]}
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, "/generate", body)
    assert refused.value.code == 400
    assert b"top_q" in refused.value.read()
    assert answer(server, request(5))


def test_the_server_says_that_it_honours_seeds_and_processors(server: ServerRecord) -> None:
    with urllib.request.urlopen(server.url + "/server_info", timeout=10) as response:
        info = json.load(response)
    assert info["enable_deterministic_inference"] and info["enable_custom_logit_processor"]
    assert info["device"] == "cpu" and not info["disable_radix_cache"]
