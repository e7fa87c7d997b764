from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.config_generation import GenerationConfig, GeneratorConfig
from tasks.core.errors import InputError
from tasks.core.generation import CUTS, FIELDS, RoleGeneration, complete, resolve_role
from tasks.core.heuristics import Heuristic, Processor, expand, family_grid, fold
from tasks.core.model_defaults import ModelDefaults
from tests.asked import generation

VALUES = {"temperature": (0.5, 0.6), "top_k": (50, 20), "top_p": (0.9, 0.8), "min_p": (0.1, 0.2),
          "repetition_penalty": (1.2, 1.05), "max_new_tokens": (99, 77), "min_new_tokens": (3, 2),
          "stop": (["END"], ["STOP"]), "stop_token_ids": ([7], [2, 5])}
"""Field -> what the config says, what the model's file says."""
NEUTRAL = generation()


def file(**fields) -> ModelDefaults:
    cuts = tuple((n, fields[n]) for n in CUTS if n in fields)
    more = tuple((n, fields.pop(n)) for n in ("typical", "epsilon", "eta") if n in fields)
    return ModelDefaults(source="m/generation_config.json", commit=None, cached=False, raw={}, fields=fields,
                         processors=cuts + more, notes=())


def of(*steps: tuple[str, float]) -> Heuristic:
    return Heuristic("h", tuple(Processor(n, v) for n, v in steps))


def steps(h: Heuristic) -> list[tuple[str, float]]:
    return [(p.name, p.value) for p in h.processors]


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(("in_config", "in_file"), list(itertools.product((False, True), repeat=2)))
def test_a_fields_value_is_of_the_highest_layer_that_gives_one(name, in_config, in_file):
    own, models = VALUES[name]
    given = GeneratorConfig(**({name: own} if in_config else {}))
    found = resolve_role("generator", given, {f"generation.generator.{name}": "run.yaml:9"},
                         file(**({name: models} if in_file else {})))
    value = found.values_from[name]
    assert (value.value, value.layer, value.origin) == (
        (own, "config", "run.yaml:9") if in_config else
        (models, "model", "m/generation_config.json") if in_file else (NEUTRAL[name], "default", "default"))


def test_nothing_is_unset_once_it_is_resolved():
    assert set(NEUTRAL) == set(FIELDS)
    assert all(value is not None for value in NEUTRAL.values())


def test_a_verdict_is_not_bent_by_a_models_file_but_by_the_judges_own_config():
    recommended = file(temperature=0.6, top_k=20, repetition_penalty=1.05)
    judge = resolve_role("judge", GenerationConfig(top_p=0.9), {}, recommended)
    assert (judge["temperature"], judge["top_k"], judge["repetition_penalty"]) == (1.0, -1, 1.0)
    assert (judge["max_new_tokens"], judge["ignore_eos"], judge["seed"], judge["top_p"]) == (1, True, 0, 0.9)
    assert judge.values_from["temperature"].layer == "method"


def test_the_generators_seed_is_the_runs_where_it_has_none():
    assert resolve_role("generator", GeneratorConfig(), {}, None, run_seed=7)["seed"] == 7
    assert resolve_role("generator", GeneratorConfig(seed=0), {}, None, run_seed=7)["seed"] == 0


def test_values_of_different_origin_that_cannot_stand_together_are_named_with_both():
    with pytest.raises(InputError, match=r"min_new_tokens is 80 \(config\), max_new_tokens is 77 \(m/generation_config"):
        resolve_role("generator", GeneratorConfig(min_new_tokens=80), {}, file(max_new_tokens=77))


def test_it_comes_back_from_run_json_as_it_was():
    found = resolve_role("generator", GeneratorConfig(stop=["x"]), {}, file(top_k=20), 3)
    assert RoleGeneration.from_recorded(found.recorded()).values_from == found.values_from


@pytest.mark.parametrize(("heuristic", "given", "layer", "done"), [
    # the config fills what a heuristic does not name, in front (temperature) or behind (cuts)
    ([("top_p", 0.9)], {"temperature": 0.5}, "config", [("temperature", 0.5), ("top_p", 0.9)]),
    ([("temperature", 0.7)], {"temperature": 0.5}, "config", [("temperature", 0.7)]),
    ([("temperature", 0.7)], {"top_p": 0.9, "top_k": 5}, "config", [("temperature", 0.7), ("top_k", 5), ("top_p", 0.9)]),
    ([("eta", 1e-3)], {"min_p": 0.1}, "config", [("eta", 1e-3), ("min_p", 0.1)]),
    # --set takes the place of what a heuristic names, where it stands
    ([("top_k", 20), ("temperature", 0.7)], {"temperature": 0.5}, "set", [("top_k", 20), ("temperature", 0.5)]),
    ([("top_k", 20), ("eta", 1e-3), ("top_k", 9)], {"top_k": 5}, "set", [("top_k", 5), ("eta", 1e-3)]),
    ([("temperature", 0.7), ("top_k", 20)], {"top_k": -1}, "set", [("temperature", 0.7)]),
    ([("temperature", 0.7)], {"temperature": 1.0}, "set", [("temperature", 1.0)]),
    ([("eta", 1e-3)], {"top_p": 0.9}, "set", [("eta", 1e-3), ("top_p", 0.9)]),
    # neutral values add nothing
    ([("eta", 1e-3)], {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}, "config", [("eta", 1e-3)]),
    # greedy: nothing else matters
    ([("top_k", 20), ("top_p", 0.9)], {"temperature": 0.0}, "config", [("temperature", 0.0)]),
    ([("temperature", 0.7), ("top_k", 20)], {"temperature": 0.0}, "set", [("temperature", 0.0)]),
    ([("temperature", 0.7)], {"temperature": 0.0}, "config", [("temperature", 0.7)]),
])
def test_a_heuristic_is_completed_by_what_the_user_wrote(heuristic, given, layer, done):
    origins = {f"generation.generator.{n}": "--set" if layer == "set" else "run.yaml:1" for n in given}
    found = resolve_role("generator", GeneratorConfig(**given), origins, None)
    assert steps(complete(of(*heuristic), found, None, False)) == done


QWEN = file(temperature=0.7, top_k=20, top_p=0.8, typical=0.9)


@pytest.mark.parametrize(("heuristic", "fill", "done"), [
    ([], False, [("temperature", 0.7), ("top_k", 20), ("top_p", 0.8), ("typical", 0.9)]),
    ([("temperature", 1.2)], False, [("temperature", 1.2)]),
    ([("temperature", 1.2)], True, [("temperature", 1.2), ("top_k", 20), ("top_p", 0.8), ("typical", 0.9)]),
    ([("typical", 0.5), ("top_p", 0.3)], True, [("temperature", 0.7), ("typical", 0.5), ("top_p", 0.3), ("top_k", 20)]),
])
def test_the_models_file_reaches_heuristics_that_name_nothing_or_those_that_shall_be_filled(heuristic, fill, done):
    found = resolve_role("generator", GeneratorConfig(), {}, QWEN)
    assert steps(complete(of(*heuristic), found, QWEN, fill)) == done


def test_a_greedy_file_makes_the_unnamed_heuristic_greedy():
    greedy = file(temperature=0.0)
    done = complete(of(), resolve_role("generator", GeneratorConfig(), {}, greedy), greedy, False)
    assert steps(done) == [("temperature", 0.0)] and done.greedy and done.describe() == "greedy"


def test_the_grids_official_cuts_are_the_models_own_where_it_has_some():
    def official(recommended):
        return [steps(h) for h in family_grid("llama", recommended) if h.name == "official, temperature 0.7"]

    assert official(()) == [[("temperature", 0.7), ("top_p", 0.9)]]
    assert official((("top_k", 20), ("top_p", 0.8))) == [[("temperature", 0.7), ("top_k", 20), ("top_p", 0.8)]]
    assert [h.name for h in family_grid("generic", (("top_k", 20),))].count("official, temperature 0.7") == 1


def test_a_models_file_leaves_the_rest_of_the_grid_alone():
    found = resolve_role("generator", GeneratorConfig(), {}, QWEN)
    plain = expand("qwen", [], QWEN.processors)
    assert [complete(h, found, QWEN, False).id for h in plain] == [h.id for h in plain]


def test_one_temperature_for_all_folds_the_grid():
    hot = resolve_role("generator", GeneratorConfig(temperature=0.9), {"generation.generator.temperature": "--set"}, None)
    folded = fold_names([complete(h, hot, None, False) for h in expand("generic", [])])
    assert len(folded) == 32  # bare and 31 cuts
    assert {p.value for h in folded for p in h.processors if p.name == "temperature"} == {0.9}


def fold_names(heuristics: list[Heuristic]) -> list[Heuristic]:
    return fold(heuristics)


names = st.sampled_from(["temperature", "top_k", "top_p", "min_p", "eta"])
LEGAL = {"temperature": st.sampled_from([0.0, 0.5, 1.0]), "top_k": st.sampled_from([-1, 5]),
         "top_p": st.sampled_from([1.0, 0.9]), "min_p": st.sampled_from([0.0, 0.1])}


@given(st.lists(names, max_size=4), st.fixed_dictionaries({}, optional=LEGAL), st.booleans(), st.booleans())
def test_completing_twice_is_completing_once_and_every_processor_is_one_that_cuts(chain, given_, by_set, fill):
    origins = {f"generation.generator.{n}": "--set" if by_set else "x" for n in given_}
    found = resolve_role("generator", GeneratorConfig(**given_), origins, QWEN)
    values = {"temperature": 0.7, "top_k": 9, "top_p": 0.6, "min_p": 0.3, "eta": 1e-3}
    done = complete(of(*((n, values[n]) for n in chain)), found, QWEN, fill)
    if done.processors:
        assert complete(done, found, QWEN, fill) == done
    for p in done.processors:
        assert math.isfinite(p.value) and p.value != CUTS.get(p.name)
    if by_set:
        for p in done.processors:
            assert p.name not in given_ or p.value == given_[p.name] or done.greedy
