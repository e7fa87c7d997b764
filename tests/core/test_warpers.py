"""The truncation maths against Hugging Face's warpers, to the last bit."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from tasks.core import warpers
from tasks.core.warpers import Step, check_step, warp, warp_rows

VALUES: dict[str, list[float]] = {
    "temperature": [0.05, 0.7, 1.0, 1.3, 5.0],
    "top_k": [1, 2, 7, 50, 96, 97, 1000],
    "top_p": [0.01, 0.5, 0.9, 0.95, 0.999, 1.0],
    "min_p": [0.0, 0.02, 0.1, 0.7, 1.0],
    "typical": [0.05, 0.2, 0.9, 0.999],
    "epsilon": [3e-4, 9e-3, 0.02, 0.9],
    "eta": [3e-4, 2e-3, 0.05, 0.9],
}
VOCAB = 97
KEEPS = [1, 2, 5, 1000]


@pytest.fixture(autouse=True)
def _one_thread():
    # With several threads torch splits the reduction of a single long row, which moves its last bit.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(logits: torch.Tensor, steps: list[Step]) -> torch.Tensor:
    """The same steps by transformers."""
    for name, value, keep in steps:
        warper = {
            "temperature": lambda v, k: hf.TemperatureLogitsWarper(float(v)),
            "top_k": lambda v, k: hf.TopKLogitsWarper(int(v), min_tokens_to_keep=k),
            "top_p": lambda v, k: hf.TopPLogitsWarper(v, min_tokens_to_keep=k),
            "min_p": lambda v, k: hf.MinPLogitsWarper(v, min_tokens_to_keep=k),
            "typical": lambda v, k: hf.TypicalLogitsWarper(v, min_tokens_to_keep=k),
            "epsilon": lambda v, k: hf.EpsilonLogitsWarper(v, min_tokens_to_keep=k),
            "eta": lambda v, k: hf.EtaLogitsWarper(v, min_tokens_to_keep=k),
        }[name](value, keep)
        logits = warper(torch.zeros(logits.shape[0], 1, dtype=torch.long), logits)
    return logits


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def sample_logits(rows: int, vocab: int, seed: int, kind: str) -> torch.Tensor:
    """Normal logits; `ties`: many equal; `cut`: most already -inf; `peaked`: one token takes nearly all."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    if kind == "ties":
        return logits.round()
    if kind == "cut":
        return logits.masked_fill(logits < 3, -math.inf)
    if kind == "peaked":
        logits[:, 3] += 60
    return logits


def steps_of(name: str) -> list[Step]:
    return [(name, value, keep) for value in VALUES[name] for keep in KEEPS]


@pytest.mark.parametrize("kind", ["normal", "ties", "cut", "peaked"])
@pytest.mark.parametrize("name", warpers.PROCESSORS)
def test_every_processor_equals_transformers_to_the_last_bit(name: str, kind: str) -> None:
    logits = sample_logits(5, VOCAB, 1, kind)
    for step in steps_of(name):
        assert identical(warp(logits, [step]), reference(logits, [step])), step


@pytest.mark.parametrize("kind", ["normal", "ties", "cut", "peaked"])
@pytest.mark.parametrize("name", warpers.PROCESSORS)
def test_rows_with_their_own_values_equal_transformers_row_by_row(name: str, kind: str) -> None:
    rows = [[step] for step in steps_of(name)]
    logits = sample_logits(len(rows), VOCAB, 2, kind)
    out = warp_rows(logits, rows)
    for i, steps in enumerate(rows):
        assert identical(out[i : i + 1], reference(logits[i : i + 1], steps)), steps


def test_a_real_vocabulary_with_mixed_chains_equals_transformers() -> None:
    chains: list[list[Step]] = [
        [("temperature", 0.7, 1), ("top_k", 50, 1), ("top_p", 0.9, 1)],
        [("temperature", 1.3, 1), ("top_k", 20, 1), ("top_p", 0.8, 1)],
        [("temperature", 1.1, 1), ("min_p", 0.05, 1)],
        [("eta", 2e-3, 1), ("temperature", 0.9, 1)],
        [("temperature", 1.0, 1), ("typical", 0.9, 1)],
        [("epsilon", 3e-4, 1)],
        [],
    ]
    rows = chains + chains[::-1]
    logits = sample_logits(len(rows), 49152, 3, "normal")
    out = warp_rows(logits, rows)
    for i, steps in enumerate(rows):
        assert identical(out[i : i + 1], reference(logits[i : i + 1], steps)), steps


@pytest.mark.parametrize(
    ("name", "value", "odds"),
    [
        ("top_p", 0.9, 1 / 9),
        ("top_p", 0.8, 1 / 4),
        ("typical", 0.7, 3 / 7),
        ("min_p", 0.1, 1 / 10),
        ("epsilon", 0.1, 1 / 9),
    ],
)
def test_the_cut_falls_between_the_same_two_neighbouring_floats(name: str, value: float, odds: float) -> None:
    # Two tokens whose odds pass the threshold one float at a time: fp32(1 - 0.9) is not fp32(1) - fp32(0.9).
    steps = torch.arange(-200, 200, dtype=torch.float32) * 2.0**-23
    logits = torch.stack([math.log(odds) + steps, torch.zeros_like(steps)], dim=1)
    out = warp(logits, [(name, value, 1)])
    assert 0 < out.isinf().sum() < len(steps)
    assert identical(out, reference(logits, [(name, value, 1)]))


steps_strategy = st.lists(
    st.sampled_from(warpers.PROCESSORS).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(VALUES[name]), st.sampled_from(KEEPS))
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(steps_strategy, min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["normal", "ties", "cut", "peaked"]),
)
def test_any_chains_equal_transformers_and_leave_the_input_alone(
    rows: list[list[Step]], seed: int, kind: str
) -> None:
    logits = sample_logits(len(rows), VOCAB, seed, kind)
    before = logits.clone()
    out = warp_rows(logits, rows)
    assert identical(logits, before)
    assert out.data_ptr() != logits.data_ptr()
    for i, steps in enumerate(rows):
        row = logits[i : i + 1]
        assert identical(out[i : i + 1], reference(row, steps))
        assert identical(warp(row, steps), reference(row, steps))


# Temperatures down to the smallest a double can hold, where transformers divides by zero.
extreme_steps = st.lists(
    st.one_of(
        st.tuples(st.just("temperature"), st.floats(5e-324, 3.4e38), st.just(1)),
        st.tuples(st.just("top_k"), st.integers(1, 10**30), st.integers(1, 10**30)),
        st.tuples(st.sampled_from(["top_p", "min_p"]), st.floats(1e-300, 1.0), st.integers(1, 9)),
        st.tuples(
            st.sampled_from(["typical", "epsilon", "eta"]),
            st.floats(1e-300, 1.0, exclude_max=True),
            st.integers(1, 9),
        ),
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(
    steps=extreme_steps,
    logits=st.lists(st.floats(-1e6, 1e6, width=32) | st.just(-math.inf), min_size=1, max_size=12),
)
def test_no_row_is_ever_cut_to_nothing(steps: list[Step], logits: list[float]) -> None:
    row = torch.tensor([logits])
    if not row.isfinite().any():
        row[0, 0] = 0.0
    out = warp(row, steps)
    assert out.isfinite().any()
    assert not out.isnan().any()
    # Typical sampling alone may cut the most likely token.
    assert out[row == row.max()].isfinite().any() or any(name == "typical" for name, _, _ in steps)


def test_a_vanishing_temperature_keeps_the_most_likely_token() -> None:
    out = warp(torch.tensor([[-3.0, -1.0, -2.0], [5.0, 1.0, 5.0]]), [("temperature", 1e-60, 1)])
    assert out.softmax(dim=-1).tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]


def test_a_temperature_of_0_keeps_the_first_of_the_likeliest_tokens_alone() -> None:
    logits = torch.tensor([[-3.0, -1.0, -2.0], [5.0, 1.0, 5.0], [3e38, -math.inf, 3e38], [1.0, 2.0, 3.0]])
    rows: list[list[Step]] = [[("temperature", t, 1)] for t in (0.0, 0.0, 0.0, 0.5)]
    out = warp_rows(logits, rows)
    assert out[:3].softmax(dim=-1).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert identical(out[3:], logits[3:] / 0.5)
    assert identical(out[:1], warp(logits[:1], rows[0]))


def test_rows_that_share_processors_run_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    sort = torch.sort

    def counting_sort(x: torch.Tensor, **kwargs: bool):
        calls.append(tuple(x.shape))
        return sort(x, **kwargs)

    monkeypatch.setattr(torch, "sort", counting_sort)
    rows: list[list[Step]] = [[("temperature", 1 + i / 8, 1), ("top_p", 0.5 + i / 64, 1)] for i in range(32)]
    warp_rows(torch.randn(32, VOCAB), rows)
    assert calls == [(32, VOCAB)]


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (("temprature", 0.7, 1), "unknown processor 'temprature'"),
        ((None, 0.7, 1), "unknown processor None"),
        (("temperature", -0.1, 1), "0 or more"),
        (("temperature", 1e39, 1), "finite"),
        (("temperature", math.nan, 1), "nan"),
        (("temperature", True, 1), "True"),
        (("temperature", "0.7", 1), "'0.7'"),
        (("top_k", 0, 1), "at least 1"),
        (("top_k", 2.5, 1), "whole"),
        (("top_k", math.inf, 1), "inf"),
        (("top_p", 0.0, 1), "(0, 1]"),
        (("top_p", 1.01, 1), "(0, 1]"),
        (("min_p", -0.1, 1), "[0, 1]"),
        (("typical", 1.0, 1), "(0, 1)"),
        (("epsilon", 0.0, 1), "(0, 1)"),
        (("eta", 10**400, 1), "(0, 1)"),
        (("top_p", 1, True), "True"),
        (("top_p", [0.9], 1), "two numbers"),
        (("top_p", 0.9, 0), "min_tokens_to_keep"),
        (("top_p", 0.9, 1.0), "min_tokens_to_keep"),
    ],
)
def test_a_step_out_of_range_is_refused_with_its_range(step: tuple, complaint: str) -> None:
    check_step("top_p", 1, 1)  # equal to, but not the same as, ("top_p", 1, True)
    with pytest.raises(ValueError) as error:
        check_step(*step)
    assert complaint in str(error.value)
    with pytest.raises(ValueError):
        warp_rows(torch.zeros(1, 3), [[step]])


def test_logits_of_another_dtype_shape_or_row_count_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        warp(torch.zeros(1, 3, dtype=torch.bfloat16), [])
    with pytest.raises(ValueError, match="shape"):
        warp(torch.zeros(3), [])
    with pytest.raises(ValueError, match="2 lists of steps for 3 rows"):
        warp_rows(torch.zeros(3, 3), [[], []])


def test_an_empty_batch_stays_empty() -> None:
    assert warp_rows(torch.zeros(0, 5), []).shape == (0, 5)
    assert warp(torch.zeros(0, 5), [("top_p", 0.9, 1)]).shape == (0, 5)


def test_the_shipped_source_imports_only_torch_and_the_standard_library() -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(Path(warpers.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    assert imported == {"collections.abc", "functools", "math", "torch", "typing"}
