"""What SGLang unpickles and calls: it computes what the warpers compute, and nothing makes it raise."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import pickle
import pickletools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.core.warpers import PROCESSORS, Step, warp
from tasks.serving import logit_processor
from tasks.serving.logit_processor import compact, decode_steps, encode_steps, processor_string

ROOT = Path(__file__).parents[2]
CHAIN: list[Step] = [("temperature", 0.7, 1), ("top_k", 5, 1), ("top_p", 0.9, 2)]


class FinishAbort:
    """Stands in for SGLang's FINISH_ABORT."""

    def __init__(self, message: str, status_code: int, err_type: str) -> None:
        self.message, self.status_code, self.err_type = message, status_code, err_type


@pytest.fixture(autouse=True)
def _sglang_module(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sglang.srt.managers.schedule_batch"
    module = types.ModuleType(name)
    module.FINISH_ABORT = FinishAbort  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


def request() -> types.SimpleNamespace:
    return types.SimpleNamespace(rid="r", to_finish=None, finished_reason=None)


def params(steps: list[Step]) -> dict[str, Any]:
    return {**encode_steps(steps), "__req__": request()}


def load() -> Any:
    """As SGLang loads it: the object in the pickle, called without arguments."""
    return pickle.loads(bytes.fromhex(json.loads(processor_string())["callable"]))()


PROCESSOR = load()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_each_row_gets_its_own_steps() -> None:
    logits = torch.randn(4, 50)
    batch = [params(CHAIN), params([]), params([("typical", 0.2, 1)]), params([("eta", 0.05, 1)])]
    out = PROCESSOR(logits, batch)
    for i, param in enumerate(batch):
        assert same(out[i : i + 1], warp(logits[i : i + 1], decode_steps(param)))
        assert param["__req__"].to_finish is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_logits_and_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 50).to(dtype)
    out = PROCESSOR(logits, [params(CHAIN)] * 2)
    assert same(out, warp(logits.float(), CHAIN).to(dtype))


def test_several_rows_of_one_request_are_processed_alike() -> None:
    logits = torch.randn(6, 50)
    first, second = params(CHAIN), params([("min_p", 0.1, 1)])
    out = PROCESSOR(logits, [first] * 3 + [second] * 3)
    assert same(out[:3], warp(logits[:3], CHAIN))
    assert same(out[3:], warp(logits[3:], [("min_p", 0.1, 1)]))


@pytest.mark.parametrize(
    ("flat", "complaint"),
    [
        ("top_p", "must list"),
        (["top_p", 0.9], "must list"),
        (["top_p", 0.9, 1] * 33, "must list"),
        (["top_q", 0.9, 1], "unknown processor 'top_q'"),
        (["top_p", math.nan, 1], "(0, 1]"),
        (["top_p", None, 1], "(0, 1]"),
        (["top_p", [0.9], 1], "two numbers"),
        (["temperature", 10**400, 1], "0 or more"),
        (["top_p", 0.9, True], "min_tokens_to_keep"),
    ],
)
def test_a_row_with_bad_parameters_is_aborted_and_the_others_are_not(flat: Any, complaint: str) -> None:
    logits = torch.randn(2, 50)
    bad, good = {"winnow": flat, "__req__": request()}, params(CHAIN)
    out = PROCESSOR(logits, [bad, good])
    assert same(out[:1], logits[:1])
    assert same(out[1:], warp(logits[1:], CHAIN))
    reason = bad["__req__"].to_finish
    assert complaint in reason.message
    assert (reason.status_code, reason.err_type) == (400, "BadRequestError")
    assert good["__req__"].to_finish is None


def test_a_request_without_the_parameters_is_aborted() -> None:
    missing = {"__req__": request()}
    PROCESSOR(torch.randn(1, 5), [missing])
    assert "no 'winnow'" in missing["__req__"].to_finish.message


def test_a_request_that_is_ending_already_keeps_its_own_reason() -> None:
    ending, ended = {"__req__": request()}, {"__req__": request()}
    ending["__req__"].to_finish = "the client left"
    ended["__req__"].finished_reason = "length"
    PROCESSOR(torch.randn(2, 5), [ending, ended])
    assert ending["__req__"].to_finish == "the client left"
    assert ended["__req__"].to_finish is None


def test_a_batch_of_another_length_aborts_every_request_and_changes_nothing() -> None:
    logits = torch.randn(3, 50)
    batch = [params(CHAIN), params(CHAIN)]
    assert PROCESSOR(logits, batch) is logits
    assert all("2 lists of parameters" in param["__req__"].to_finish.message for param in batch)


def test_a_failing_batch_is_tried_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(logits: torch.Tensor, rows: list[list[Step]]) -> torch.Tensor:
        if len(rows) > 1 or rows[0][0][0] == "eta":
            raise torch.OutOfMemoryError("no memory")
        return warp(logits, rows[0])

    monkeypatch.setitem(type(PROCESSOR).__call__.__globals__, "warp_rows", fragile)
    logits = torch.randn(2, 50)
    good, bad = params(CHAIN), params([("eta", 0.1, 1)])
    out = PROCESSOR(logits, [good, bad])
    assert same(out, torch.cat([warp(logits[:1], CHAIN), logits[1:]]))
    assert good["__req__"].to_finish is None
    assert "no memory" in bad["__req__"].to_finish.message


class Dead:
    """A weak reference to a request that is gone."""

    def __getattr__(self, name: str) -> Any:
        raise ReferenceError("weakly-referenced object no longer exists")


@pytest.mark.parametrize("unusable", [{"__req__": Dead()}, {"__req__": None}, {}, None, 3, "x", []])
def test_a_request_that_cannot_be_aborted_is_logged_and_raises_nothing(
    unusable: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logits = torch.randn(1, 5)
    assert same(PROCESSOR(logits, [unusable]), logits)
    assert "could not be aborted" in caplog.text


@pytest.mark.parametrize("logits", [None, 3, "x", torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(1, 0)])
@pytest.mark.parametrize("batch", [None, [], {}, "x", [None], [{}], [{"winnow": ["top_p", 0.9, 1]}]])
def test_odd_calls_return_the_logits(logits: Any, batch: Any) -> None:
    out = PROCESSOR(logits, batch)
    assert out is logits or same(out, logits)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(PROCESSORS)
)
garbage = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
# A name, then anything: the shape of a real list, so that most get past the first check.
near_misses = st.lists(st.tuples(st.sampled_from(PROCESSORS), scalars, scalars), max_size=3).map(
    lambda steps: {"winnow": [part for step in steps for part in step]}
)
any_params = garbage | garbage.map(lambda inner: {"winnow": inner}) | near_misses


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(any_params, max_size=5), seed=st.integers(0, 999), extra=st.sampled_from([0, 0, 0, 1]))
def test_garbage_never_raises_and_leaves_valid_rows_right(batch: list[Any], seed: int, extra: int) -> None:
    requests = [request() for _ in batch]
    sent = [{**p, "__req__": r} if isinstance(p, dict) else p for p, r in zip(batch, requests, strict=True)]
    sent.append(params(CHAIN))
    logits = torch.randn(len(sent) + extra, 30, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    out = PROCESSOR(logits, sent)
    assert same(logits, before)
    if extra:
        assert same(out, logits)
        return
    assert same(out[-1:], warp(logits[-1:], CHAIN))
    for i, (param, asked) in enumerate(zip(batch, requests, strict=True)):
        try:
            expected = warp(logits[i : i + 1], decode_steps(param))
        except ValueError:
            expected = logits[i : i + 1]
            assert asked.to_finish is not None or not isinstance(param, dict)
        assert same(out[i : i + 1], expected)


def test_parameters_survive_json() -> None:
    steps: list[Step] = [("temperature", 1, 1), ("top_k", 50.0, 1), ("typical", 0.123456789, 3)]
    sent = json.loads(json.dumps(encode_steps(steps)))
    assert decode_steps(sent) == steps
    assert [type(part) for part in sent["winnow"][:5]] == [str, float, int, str, int]


def test_steps_that_the_server_would_refuse_are_not_encoded() -> None:
    with pytest.raises(ValueError, match="top_q"):
        encode_steps([("top_q", 0.9, 1)])
    with pytest.raises(ValueError, match="32"):
        encode_steps([("top_p", 0.9, 1)] * 33)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=processor_string(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_string_is_the_same_in_another_process() -> None:
    code = "import hashlib; from tasks.serving.logit_processor import processor_string as s; "
    code += "print(hashlib.sha256(s().encode()).hexdigest())"
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    printed = run_python(code, PYTHONHASHSEED=other, PYTHONPATH=str(ROOT))
    assert printed.strip() == hashlib.sha256(processor_string().encode()).hexdigest()


def program(source: str) -> str:
    """What the source does, whatever its layout: its syntax tree without texts that stand alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return ast.dump(tree)


@pytest.mark.parametrize("path", [
    "tasks/core/warpers.py", "tasks/serving/logit_processor.py", "tasks/serving/limit.py", "tasks/publish/report_sections.py",
    "tests/serving/test_logit_processor.py",
])
def test_the_compact_source_is_the_same_program(path: str) -> None:
    source = (ROOT / path).read_text()
    short = compact(source)
    assert program(short) == program(source)
    assert len(short) < 0.95 * len(source)
    assert compact(short) == short


@pytest.mark.parametrize(("source", "short"), [
    ('def f(a, b = 1):\n    """Doc."""\n    return a+ b  # why\n', "def f(a,b=1):\n return a+b\n"),
    ("x = 3\n'''About\nx.'''\n\ny = [  # one\n    1,\n]\n", "x=3\ny=[1,]\n"),
    ("x = 'a # b'\ny = f'{x !r:>{3}} # {1 + 1}' \"c\" ''\n", "x='a # b'\ny=f'{x !r:>{3}} # {1 + 1}' \"c\" ''\n"),
    ("class A:\n    def f(self):\n        if not 'a' or 1: pass\n", "class A:\n def f(self):\n  if not 'a' or 1:pass\n"),
    ('x = """a\n  b""" if y else f"""{\n  z}\n"""\n', 'x="""a\n  b""" if y else f"""{\n  z}\n"""\n'),
])
def test_compact_leaves_out_what_only_people_read(source: str, short: str) -> None:
    assert compact(source) == short


def test_the_string_is_short() -> None:
    assert len(processor_string()) < 20_000


def test_the_pickle_is_one_constant_expression() -> None:
    data = bytes.fromhex(json.loads(processor_string())["callable"])
    opcodes = [(op.name, arg) for op, arg, _ in pickletools.genops(data)]
    assert opcodes[:2] == [("PROTO", 2), ("GLOBAL", "__builtin__ eval")]
    assert [name for name, _ in opcodes[2:]] == [
        "BINPUT", "BINUNICODE", "BINPUT", "TUPLE1", "BINPUT", "REDUCE", "BINPUT", "STOP",
    ]  # fmt: skip
    assert str(opcodes[3][1]).isascii()


def test_the_server_needs_nothing_of_this_project() -> None:
    code = """
import json, pickle, sys
import torch
before = set(sys.modules)
processor = pickle.loads(bytes.fromhex(json.loads(sys.stdin.read())["callable"]))()
out = processor(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), [{"winnow": ["top_k", 1, 1]}, {"winnow": [3]}])
print(out.tolist(), any(name.startswith(("tasks", "flows")) for name in sys.modules))
"""
    assert run_python(code, PYTHONPATH="").strip() == "[[-inf, -inf, 2.0], [0.0, 1.0, 2.0]] False"


def test_the_shipped_names_are_all_defined() -> None:
    shipped = type(PROCESSOR).__call__.__globals__
    assert shipped["__name__"] == "winnow_logit_processor"
    assert shipped["warp_rows"] is not logit_processor.warp_rows
    assert {"decode_steps", "refuse", "check_step", "Any", "Step"} <= set(shipped)


SGLANG = """
import sys
from types import SimpleNamespace
import torch
import tasks.serving.sglang_cpu.launch  # its stand-ins let SGLang be imported without a GPU build
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_batch_info import ProcessorEntry
class Info:
    def __init__(self, params, rows):
        entry = ProcessorEntry(CustomLogitProcessor.from_str(sys.stdin.read()), rows, torch.tensor(rows))
        self.custom_params, self.custom_logit_processor, self.device = params, {0: entry}, "cpu"
    def __len__(self):
        return len(self.custom_params)
request = SimpleNamespace(to_finish=None, finished_reason=None, rid="r")
params = [None, {"winnow": ["top_k", 1, 1]}, {"winnow": ["top_q", 1, 1], "__req__": request}]
logits = torch.tensor([[0.0, 1.0, 2.0]] * 6)
apply_custom_logit_processor(logits, Info(params, [1, 2]), num_tokens_in_batch=2)
assert isinstance(request.to_finish, FINISH_ABORT)
print(logits.tolist(), request.to_finish.to_json()["message"][:34])
"""


@pytest.mark.sglang
def test_sglang_loads_and_runs_it() -> None:
    printed = run_python(SGLANG, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1").strip().splitlines()[-1]
    plain, first = "[0.0, 1.0, 2.0]", "[-inf, -inf, 2.0]"
    rows = ", ".join([plain, plain, first, first, plain, plain])
    assert printed == f"[{rows}] winnow: unknown processor 'top_q':"
