from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.core.heuristics import Heuristic, Processor
from tasks.generation.candidates import Cell
from tasks.generation.verify import check


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode()


H = Heuristic("h", (Processor("temperature", 1.0),))
CELLS = [Cell(f"c{n}", {"prompt_id": f"p{n}"}, H, 0, n) for n in range(6)]


def row(cell: Cell, **changes) -> dict:
    return {"candidate_id": cell.candidate_id, "prompt_id": cell.prompt["prompt_id"], "heuristic_id": H.id, "seed": 0,
            "request_seed": cell.request_seed, "status": "ok", "output_ids": list(b"hi"), "text": "hi"} | changes


DEFECTS = {
    "missing": lambda c: [], "duplicate": lambda c: [row(c), row(c)], "timeout": lambda c: [row(c, status="timeout")],
    "undecodable": lambda c: [row(c, text="ho")], "too_long": lambda c: [row(c, output_ids=list(b"x" * 9), text="x" * 9)],
    "wrong_cell": lambda c: [row(c, request_seed=99)], None: lambda c: [row(c)],
}


@given(st.lists(st.sampled_from(list(DEFECTS)), min_size=6, max_size=6))
def test_each_defect_is_found_in_its_cell_and_nowhere_else(kinds):
    rows = [r for cell, kind in zip(CELLS, kinds, strict=True) for r in DEFECTS[kind](cell)]
    found = {d.cell.candidate_id: d.kind for d in check(CELLS, rows, Bytes(), 8)}
    assert found == {c.candidate_id: k for c, k in zip(CELLS, kinds, strict=True) if k}


def test_a_defect_names_its_cell():
    (defect,) = check(CELLS[:1], [], Bytes(), 8)
    assert defect.describe() == {"candidate_id": "c0", "prompt_id": "p0", "heuristic": "h", "seed": 0,
                                 "defect": "missing"}
