from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import identity
from tasks.core.config import RunConfig
from tasks.core.heuristics import Heuristic, Processor
from tasks.generation import grid as module
from tasks.generation.grid import Grid
from tests.asked import generation
from tests.plain_ids import candidate_id, request_seed

GENERATION = generation(max_new_tokens=8, seed=5)


def make(prompts: list[str], heuristics: list[float], seeds: list[int], block_rows: int = 512, shard: slice | None = None,
         servers: int = 1) -> Grid:
    """A grid over prompts by name, heuristics by temperature; `shard`: which of the prompts it holds."""
    config = RunConfig.model_validate({
        "run": "r", "model": {"path": "m"}, "sources": [{"name": "s", "path": "p.jsonl"}], "seeds": seeds,
        "heuristics": {"family": "qwen"}, "run_seed": 5,
        "servers": [{"url": f"http://127.0.0.1:{n + 1}"} for n in range(servers)]})
    rows = [{"prompt_id": identity.digest(p), "source": "s", "prompt_ids": [n]} for n, p in enumerate(prompts)]
    table = pa.Table.from_pylist(rows[shard or slice(None)], schema=pa.schema(
        [("prompt_id", pa.string()), ("source", pa.string()), ("prompt_ids", pa.list_(pa.int32()))]))
    ctx = SimpleNamespace(config=config, store=None, generation=lambda _: GENERATION, raw={
        "candidate_identity": GENERATION.identity()}, heuristics=[
        Heuristic(f"t{t}", (Processor("temperature", t),)) for t in heuristics])
    with mock.patch.object(module, "read_shard", lambda store, n: table), \
            mock.patch.object(module, "BLOCK_ROWS", block_rows):
        return Grid(ctx, 0)  # type: ignore[arg-type]


def cells(grid: Grid) -> list[module.Cell]:
    return [grid.cell(n) for n in range(len(grid))]


SIZES = {"prompts": st.integers(0, 9), "heuristics": st.integers(1, 5), "seeds": st.integers(1, 4),
         "block_rows": st.integers(1, 60)}


@given(**SIZES)
def test_cells_are_every_prompt_heuristic_and_seed_in_this_order(prompts, heuristics, seeds, block_rows):
    grid = make([f"p{n}" for n in range(prompts)], [0.5 + n / 10 for n in range(heuristics)], list(range(seeds)), block_rows)
    wanted = list(itertools.product(grid.prompts, [h.name for h, _ in grid.heuristics], grid.seeds))
    assert [(c.prompt, c.heuristic.name, c.seed) for c in cells(grid)] == wanted
    assert [c.number for c in cells(grid)] == list(range(len(grid))) == list(range(prompts * heuristics * seeds))


@given(**SIZES)
def test_a_cells_ids_are_those_of_the_identity_module(prompts, heuristics, seeds, block_rows):
    grid = make([f"p{n}" for n in range(prompts)], [0.5 + n / 10 for n in range(heuristics)], list(range(seeds)), block_rows)
    generation = GENERATION.identity() | {"text_key": "prompt"}  # of the source: which column was asked
    for c in cells(grid):
        p, h = c.prompt["prompt_id"], c.heuristic.id
        assert c.heuristic_id == h
        assert c.candidate_id == candidate_id(p, h, c.seed, "m", None, generation)
        assert c.request_seed == request_seed(5, p, h, c.seed)


@given(**SIZES)
def test_blocks_are_whole_prompts_and_together_the_grid(prompts, heuristics, seeds, block_rows):
    grid = make([f"p{n}" for n in range(prompts)], [0.5 + n / 10 for n in range(heuristics)], list(range(seeds)), block_rows)
    everything, per_prompt = cells(grid), heuristics * seeds
    size = max(1, block_rows // per_prompt) * per_prompt
    blocks = [everything[i:i + size] for i in range(0, len(everything), size)]
    assert grid.blocks == len(blocks)
    assert [list(grid.block(n)) for n in range(grid.blocks)] == blocks
    for nth, seed in enumerate(grid.seeds):
        assert [list(grid.block(n, nth)) for n in range(grid.blocks)] == [
            [c for c in block if c.seed == seed] for block in blocks]


def ids(grid: Grid) -> dict[tuple[str, str, int], tuple[str, int]]:
    return {(c.prompt["prompt_id"], c.heuristic.name, c.seed): (c.candidate_id, c.request_seed) for c in cells(grid)}


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32), st.integers(1, 9))
def test_ids_do_not_depend_on_shards_servers_or_the_order_of_anything(prompts, heuristics, seeds, rng_seed, size):
    names, warmth, labels = [f"p{n}" for n in range(prompts)], [0.5 + n / 10 for n in range(heuristics)], list(range(seeds))
    whole = ids(make(names, warmth, labels))
    assert len(whole) == len({i for i, _ in whole.values()}) == len({s for _, s in whole.values()})
    parts = [ids(make(names, warmth, labels, shard=slice(at, at + size), servers=size)) for at in range(0, prompts, size)]
    assert {k: v for part in parts for k, v in part.items()} == whole
    rng = random.Random(rng_seed)
    assert ids(make(rng.sample(names, prompts), rng.sample(warmth, heuristics), rng.sample(labels, seeds))) == whole


@pytest.mark.parametrize("number", [0, 3, 11])
def test_a_cell_tells_people_where_it_is(number):
    grid = make(["a", "b"], [0.5, 0.7], [3, 1, 2])
    cell = grid.cell(number)
    assert cell.describe() == {"candidate_id": cell.candidate_id, "prompt_id": grid.prompts[number // 6]["prompt_id"],
                               "heuristic": ("t0.5", "t0.7")[number // 3 % 2], "seed": (3, 1, 2)[number % 3]}
