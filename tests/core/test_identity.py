from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tasks.core import identity
from tasks.core.identity import CellIds
from tests.plain_ids import candidate_id, request_seed

HEX = st.text("0123456789abcdef", min_size=1, max_size=32)
TEXT = st.text(max_size=8) | st.sampled_from(['"', "\\", "a,b", '"],[', "é\u2028", "\x00"])
GENERATIONS = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers(-5, 10**6) | TEXT | st.lists(TEXT, max_size=2),
                              max_size=4)


@given(st.integers(0, 2**70), TEXT, st.none() | TEXT, GENERATIONS, HEX, HEX, st.integers(0, 2**62))
def test_ids_of_many_cells_are_those_of_one_cell(run_seed, model, revision, generation, prompt, heuristic, seed):
    ids = CellIds(run_seed, model, revision, generation)
    assert ids(prompt, heuristic, seed) == (
        candidate_id(prompt, heuristic, seed, model, revision, generation),
        request_seed(run_seed, prompt, heuristic, seed))


def test_a_cells_ids_are_the_same_in_every_version():
    """Golden: another digest would orphan every run that stands."""
    assert CellIds(0, "m", None, {"max_new_tokens": 8})("ab", "cd", 1) == (
        "92b10bee52b687f78f0c7b89c8a49d5e", 1081139787767911437)


@given(st.integers(0, 2**62), HEX, HEX, st.integers(0, 2**40))
def test_a_seed_fits_an_int64_and_the_servers_range(run_seed, prompt, heuristic, seed):
    assert 0 <= request_seed(run_seed, prompt, heuristic, seed) < 2**62


def test_seeds_of_twenty_thousand_cells_are_distinct():
    prompts, heuristics = [identity.digest("p", n) for n in range(50)], [identity.digest("h", n) for n in range(100)]
    ids = CellIds(3, "m", None, {})
    cells = [ids(p, h, s) for p in prompts for h in heuristics for s in range(4)]
    assert len({name for name, _ in cells}) == len({seed for _, seed in cells}) == 20_000


def test_another_run_seed_is_another_seed_for_the_same_candidate():
    one, other = (CellIds(n, "m", None, {})("ab", "cd", 1) for n in (0, 1))
    assert one[0] == other[0]
    assert one[1] != other[1]


@given(st.lists(st.tuples(TEXT, st.integers(0, 9)), max_size=4))
def test_the_order_of_keys_is_no_part_of_an_identity(items):
    forth, back = dict(items), dict(reversed(dict(items).items()))
    assert identity.digest(forth) == identity.digest(back)
    assert json.loads(identity.canonical(forth)) == forth


def test_a_prompt_is_its_source_and_its_row():
    row = {"question": "1 + 1?", "answer": "2"}
    known = {identity.prompt_id("a", row), identity.prompt_id("b", row), identity.prompt_id("a", row | {"answer": "3"})}
    assert len(known) == 3
    assert identity.prompt_id("a", dict(reversed(row.items()))) in known
