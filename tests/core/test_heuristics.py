from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.errors import InputError
from tasks.core.heuristics import FAMILIES, Heuristic, Processor, expand, family_grid, fold, parse_processor, read_file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_unique_validated_heuristics(family):
    found = expand(family, [])
    assert len({h.id for h in found}) == len({h.name for h in found}) == len(found)
    for h in found:  # what the grid makes, a file could say
        assert [parse_processor({"name": p.name, "params": p.params}, "x") for p in h.processors] == list(h.processors)


def test_the_grid_is_the_published_one():
    assert len(family_grid("qwen")) == len(expand("qwen", [])) == 396
    llama = expand("llama", [])
    assert len(llama) == 384  # its official cut is top_p 0.9, which the grid has
    assert {h.aliases for h in llama if h.aliases} == {
        (f"top_p 0.9, temperature {t:g}",) for t in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.4, 1.7, 2.1, 2.5)}


def test_official_cuts_come_in_hugging_face_order():
    official = next(h for h in family_grid("gemma") if h.name.startswith("official"))
    assert [p.name for p in official.processors] == ["temperature", "top_k", "top_p"]


def pipeline(*processors: dict, **more) -> dict:
    return {"name": "mine", "processors": list(processors)} | more


def processor(name: str, **params) -> dict:
    return {"name": name, "params": params}


@pytest.mark.parametrize(("entry", "said"), [
    (pipeline(processor("topp", top_p=0.9)), ["processors.0.name", "unknown processor 'topp'", "did you mean 'top_p'?"]),
    (pipeline(processor("top_p", p=0.9)), ["processors.0.params", "unknown parameter 'p'"]),
    (pipeline(processor("top_p", top_p=1.5)), ["processors.0.params.top_p", "1.5", "at most 1"]),
    (pipeline(processor("top_p", top_p=True)), ["out of range"]),
    (pipeline(processor("top_k", top_k=2.5)), ["top_k", "whole number"]),
    (pipeline(processor("temperature", temperature=-0.1)), ["between 0 (the likeliest token) and 100"]),
    (pipeline(processor("eta", epsilon=float("nan"))), ["out of range"]),
    (pipeline(processor("typical")), ["typical needs 'mass'"]),
    (pipeline(processor("temperature", temperature=1, min_tokens_to_keep=2)), ["removes no tokens"]),
    (pipeline({"name": "top_p", "parms": {}}), ["unknown key 'parms'", "did you mean 'params'?"]),
    (pipeline(wight=2), ["unknown key 'wight'", "did you mean 'weight'?"]),
    ({"processors": []}, ["needs a name"]),
    ({"name": "x"}, ["processors: must be a list"]),
])
def test_a_mistake_in_a_file_names_file_and_key(tmp_path, entry, said):
    path = tmp_path / "h.yaml"
    path.write_text(yaml.safe_dump({"sampling_pipelines": [pipeline(), entry]}))
    with pytest.raises(InputError) as caught:
        read_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: sampling_pipelines.1")
    for words in said:
        assert words in message


def test_the_published_form_is_read_and_weight_zero_leaves_out(tmp_path):
    path = tmp_path / "h.yaml"
    path.write_text(yaml.safe_dump({"sampling_pipelines": [
        pipeline(processor("typical", mass=0.9, min_tokens_to_keep=2), processor("temperature", temperature=1), weight=0.8),
        {"name": "never", "weight": 0, "processors": []}]}))
    (found,) = read_file(path)
    assert found.steps == [("typical", 0.9, 2), ("temperature", 1.0, 1)]


def test_identity_is_of_ordered_processors_not_of_the_name():
    a, b = Processor("temperature", 1.2), Processor("top_p", 0.9)
    assert Heuristic("x", (a, b)).id == Heuristic("y", (a, b)).id != Heuristic("x", (b, a)).id
    # golden: an id that changes would orphan every dataset made before
    assert Heuristic("x", (a, b)).id == "f5e3fafa42778779d14215df88a737b0"


def test_equal_heuristics_fold_and_keep_their_names():
    t = (Processor("temperature", 1.0),)
    (found,) = fold([Heuristic("a", t), Heuristic("b", t), Heuristic("a", t)])
    assert (found.name, found.aliases) == ("a", ("b",))
    with pytest.raises(InputError, match="two different heuristics are named 'a'"):
        fold([Heuristic("a", t), Heuristic("a", ())])


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(["temperature", "top_p", "min_p", "typical",
                                                                         "epsilon", "eta", "top_k"]))
def test_any_number_is_either_in_range_or_refused(value, name):
    key = {"typical": "mass", "epsilon": "epsilon", "eta": "epsilon"}.get(name, name)
    try:
        parsed = parse_processor(processor(name, **{key: value}), "here")
    except InputError as error:
        assert "here.params" in str(error)
    else:
        assert parsed.value == value > 0 or (name in ("min_p", "temperature") and value == 0)
        assert name in ("temperature", "top_k") or value <= 1
