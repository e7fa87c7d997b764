from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.heuristics import Heuristic, Processor, expand
from tasks.serving.client import ServerFacts
from tasks.serving.compile import Template, compile_heuristic, largest_mask, recording
from tasks.serving.logit_processor import decode_steps
from tests.asked import generation

T, K, P, M = (Processor("temperature", 0.7), Processor("top_k", 20), Processor("top_p", 0.9), Processor("min_p", 0.1))


def of(*processors: Processor) -> Heuristic:
    return Heuristic("h", processors)


@pytest.mark.parametrize(("processors", "native"), [
    ((), (1.0, -1, 1.0, 0.0)), ((T,), (0.7, -1, 1.0, 0.0)), ((T, K), (0.7, 20, 1.0, 0.0)), ((K, T), (0.7, 20, 1.0, 0.0)),
    ((Processor("temperature", 0.0),), (0.0, -1, 1.0, 0.0)), ((T, P), (0.7, -1, 0.9, 0.0)), ((T, M), (0.7, -1, 1.0, 0.1)), ((P,), (1.0, -1, 0.9, 0.0)),
])
def test_one_cut_after_the_temperature_is_native_where_seeds_are_ignored(processors, native):
    made = compile_heuristic(of(*processors), honours_seeds=False)
    assert made.custom_params is None
    assert (made.temperature, made.top_k, made.top_p, made.min_p) == native


@pytest.mark.parametrize("processors", [
    (T, K, P), (P, T), (M, T), (T, T), (T, Processor("top_p", 0.9, 2)), (T, Processor("eta", 1e-3)),
    (T, Processor("epsilon", 1e-3)), (Processor("typical", 0.9),), (P, Processor("top_p", 0.5)),
])
def test_what_the_engine_would_change_goes_to_the_processor_in_order(processors):
    made = compile_heuristic(of(*processors), honours_seeds=False)
    assert made.custom_params is not None
    assert decode_steps(made.custom_params) == of(*processors).steps
    # nothing native may act beside it
    assert (made.temperature, made.top_k, made.top_p, made.min_p) == (1.0, -1, 1.0, 0.0)


processors = st.lists(st.sampled_from(
    [T, K, P, M, Processor("temperature", 0.0), Processor("eta", 1e-3), Processor("typical", 0.9), Processor("epsilon", 1e-3)]), max_size=4)


@given(processors, st.booleans())
def test_no_request_kills_a_server_or_depends_on_its_batch(chain, honours_seeds):
    made = compile_heuristic(of(*chain), honours_seeds)
    params = made.sampling_params(generation(max_new_tokens=5), 42)
    # to the engine a temperature of 0 is a top_k of 1
    cuts = params["temperature"] == 0 or (params["top_k"], params["top_p"], params["min_p"]) != (-1, 1.0, 0.0)
    if honours_seeds:
        assert not cuts
    if cuts:
        assert "custom_params" not in params
    assert ("custom_params" in params) == (made.processor is not None)


@given(processors, st.booleans())
def test_every_sampling_field_is_explicit(chain, honours_seeds):
    params = compile_heuristic(of(*chain), honours_seeds).sampling_params(
        generation(max_new_tokens=9, min_new_tokens=2, stop=["END"]), 7)
    assert set(params) - {"custom_params"} == {
        "temperature", "top_k", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "skip_special_tokens",
        "spaces_between_special_tokens", "no_stop_trim", "sampling_seed"}
    assert (params["max_new_tokens"], params["min_new_tokens"], params["stop"], params["sampling_seed"]) == (
        9, 2, ["END"], 7)


def test_the_whole_grid_compiles_both_ways():
    for family in ("llama", "qwen"):
        for heuristic in expand(family, []):
            for honours in (True, False):
                made = compile_heuristic(heuristic, honours)
                if made.custom_params is not None:
                    assert decode_steps(made.custom_params) == heuristic.steps


def server(honours_seeds: bool = False, **info) -> ServerFacts:
    known = {"sampling_mask_max_tokens": 4096, "sampling_backend": "pytorch"} | info
    return ServerFacts("http://s", "m", honours_seeds, True, known)


@pytest.mark.parametrize(("facts", "largest"), [
    (server(), 4096), (server(sampling_mask_max_tokens=100), 100), (server(sampling_mask_max_tokens=9000), 4096),
    (server(sampling_backend="flashinfer"), 2048), (server(sampling_mask_max_tokens=None), 0),
    (server(speculative_algorithm="EAGLE"), 0), (server(sampling_backend="ascend"), 0),
])
def test_a_server_says_of_how_large_a_set_it_gives_the_mask(facts, largest):
    assert largest_mask(facts) == largest


def top_k(k: int) -> Processor:
    return Processor("top_k", k)


@pytest.mark.parametrize(("processors", "largest", "masked"), [
    ((T, K), 4096, True), ((K, T), 4096, True), ((T, top_k(1)), 4096, True), ((T, top_k(4096)), 4096, True),
    ((T, top_k(4097)), 4096, False), ((T, K), 19, False), ((T, top_k(1)), 0, False), ((T, K), 0, False),
    ((Processor("temperature", 0.0),), 4096, True), ((Processor("temperature", 0.0),), 0, False), ((T,), 4096, False), ((T, P), 4096, False), ((T, M), 4096, False), ((T, K, P), 4096, False),
])
def test_a_mask_can_be_had_of_a_native_top_k_within_the_servers_limit(processors, largest, masked):
    assert compile_heuristic(of(*processors), honours_seeds=False).masked(largest) is masked
    assert compile_heuristic(of(*processors), honours_seeds=True).masked(largest) is False


@pytest.mark.parametrize("masked", [True, False])
def test_a_body_asks_for_the_mask_only_where_it_shall(masked):
    template = Template(compile_heuristic(of(T, K), honours_seeds=False), generation(max_new_tokens=5), masked)
    body = json.loads(template.body("[1, 2]", "r", 7))
    assert body.pop("return_sampling_mask", False) is masked
    assert body == {"input_ids": [1, 2], "rid": "r", "return_logprob": True, "logprob_start_len": -1,
                    "top_logprobs_num": 0, "stream": False,
                    "sampling_params": template.compiled.sampling_params(generation(max_new_tokens=5), 7)}


def test_the_log_says_which_heuristics_are_recorded_and_where():
    grid = [Heuristic("ranked", (T, K)), Heuristic("plain", (T,)), Heuristic("both", (T, K, P))]
    some = recording([server(), server(honours_seeds=True)], grid)
    assert "recorded for 1 heuristic (ranked) of 3, on 1 of 2 servers" in some
    assert "no mask will be recorded" in recording([server(honours_seeds=True)], grid)
    assert "no mask will be recorded" in recording([server()], grid[1:])
