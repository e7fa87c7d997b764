from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.labels.verifiers import Verdict, VerifierPool, check_ground_truth, verify

# (text, ground truth, right?)
GOLDEN = [
    ("so $\\boxed{\\dfrac{3}{4}}$", "0.75", True),
    ("\\boxed{\\frac34}", "\\frac{3}{4}", True),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
    ("\\boxed{x^2+2x+2}", "(x+1)^2", False),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),
    ("\\boxed{-1.50}", "-\\frac32", True),
    ("\\boxed{1,234}", "1234", True),
    ("\\boxed{(1,2)}", "(1, 2)", True),
    ("\\boxed{(2,1)}", "(1,2)", False),
    ("\\boxed{[0,\\infty)}", "[0, \\infty)", True),
    ("\\boxed{(0,\\infty)}", "[0, \\infty)", False),
    ("\\boxed{2,1}", "1,2", True),
    ("\\boxed{1} and \\boxed{2}", "1,2", True),
    ("\\boxed{1} and \\boxed{2}", "2", False),
    ("\\boxed{10\\text{ cm}}", "10", True),
    ("\\boxed{Evelyn}", "\\text{Evelyn}", True),
    ("\\boxed{\\text{Maria}}", "\\text{Evelyn}", False),
    ("\\boxed{B}", "\\text{(B)}", True),
    ("\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("\\boxed{x=5}", "5", True),
    ("The answer is $\\frac{1}{2}$.", "Half of one is \\boxed{\\frac12}.", True),
    ("The answer is 42.", "$42$", True),
    ("The answer is 43.", "42", False),
    ("First \\boxed{3}. No: \\boxed{4}", "4", True),
    ("$\\boxed{1}$, $\\boxed{2}$ or $\\boxed{3}$", "1,2,3", True),
    ("\\boxed{7}" + " so it is" * 5000, "7", True),
    ("a" * 100_000 + "\\boxed{7.0}" + " b" * 50_000, "7", True),
]  # fmt: skip
IDS = [f"{text[:40]}={truth}" for text, truth, _ in GOLDEN]


@pytest.mark.parametrize(("text", "truth", "right"), GOLDEN, ids=IDS)
def test_answers_are_compared_as_mathematics(text: str, truth: str, right: bool) -> None:
    verdict = verify("math", text, truth)
    assert (verdict.score, verdict.reason) == (float(right), None), verdict
    assert verdict.extracted


@pytest.mark.parametrize("text", ["", "I do not know.", "\\boxed{"])
def test_a_text_without_an_answer_is_wrong_for_want_of_one(text: str) -> None:
    assert verify("math", text, "42") == Verdict(0.0, None, "no_answer")


def test_main_thread_worker_threads_and_processes_agree_and_repeat() -> None:
    jobs = [("math", text, truth) for text, truth, _ in GOLDEN]
    here = [verify(*job) for job in jobs]
    with ThreadPoolExecutor(4) as threads:
        in_threads = list(threads.map(lambda job: verify(*job), jobs * 4))
    with VerifierPool(2, 60.0) as pool:
        in_processes = pool.run(jobs)
        again = pool.run(jobs)
    assert in_threads == here * 4
    assert in_processes == here
    assert again == here


@pytest.mark.parametrize("truth", ["42", "\\frac{1}{2}", "$x$", "so \\boxed{3} it is", "\\text{Evelyn}", "\\{1,2\\}"])
def test_a_ground_truth_with_one_answer_is_accepted(truth: str) -> None:
    assert check_ground_truth("math", truth) is None


@pytest.mark.parametrize(
    ("truth", "named"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("\\boxed{}", "empty"),
        ("\\boxed{\\frac{1}{2}", "not closed"),
        ("\\frac{1}{2", "braces"),
        ("Let us think. " * 200, "must box"),
    ],
)
def test_a_malformed_ground_truth_is_named_and_never_scored(truth: str, named: str) -> None:
    assert named in (check_ground_truth("math", truth) or "fine")
    verdict = verify("math", "\\boxed{1}", truth)
    assert verdict.score is None
    assert named in (verdict.reason or "")


def test_no_warning_about_the_time_limit_that_is_switched_off_on_purpose(caplog: pytest.LogCaptureFixture) -> None:
    import math_verify.grader
    import math_verify.parser

    math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = False
    with caplog.at_level(logging.WARNING):
        verify("math", "\\boxed{x+1}", "1+x")
    assert caplog.records == []
