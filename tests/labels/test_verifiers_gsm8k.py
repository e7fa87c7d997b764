from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.labels.verifiers import Verdict, check_ground_truth, verify
from tasks.labels.verifiers.gsm8k import extract

REFERENCE_DATA = Path(os.environ.get("WINNOW_REFERENCE_DATA") or Path(__file__).parents[3] / "shared" / "data")

# (text, ground truth, right?)
GOLDEN = [
    # statements of the answer
    ("48/2 = 24, 48 + 24 = 72\n#### 72", "72", True),
    ("#### 72", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", True),
    ("####72", "72", True),
    ("####\n72", "72", True),
    ("#### 70\nWait, April was 48.\n#### 72", "72", True),
    ("#### 72\nI checked it in 2 ways. Hope this helps!", "72", True),
    ("#### 72. I hope this helps you with 3 more.", "72", True),
    ("#### $72", "72", True),
    ("#### -5", "-5", True),
    ("#### 5", "-5", False),
    ("#### Step 1: April\nShe sold 48.\n#### Step 2: May\nShe sold 24, so 72", "72", True),
    ("#### 1. April\nShe sold 48.\n#### 2. May\nShe sold 24, so 72", "72", True),
    ("A: 72", "72", True),
    ("First 48, then 24.\nA: 72", "72", True),
    ("A: She sold 72 clips in 2 months", "72", True),
    ("A: Natalia sold 48 + 24 = 72 clips", "72", True),
    ("**Answer:** 72", "72", True),
    ("**Answer: 72**", "72", True),
    ("Final Answer:\n\n72 clips", "72", True),
    ("Answer: Let's see. Half of 48 is 24 clips. In all she sold 72.", "72", True),
    ("Answer:\n1. April: 48 clips.\n2. May: 24 clips.\n3. Altogether: 72", "72", True),
    ("The answer is 72.", "72", True),
    ("The answer is 72 because 48/2 = 24.", "72", True),
    ("The answer is 48 + 24 = 72 clips.", "72", True),
    ("The answer is the sum of 48 and 24, which makes 72.", "72", True),
    ("So the final answer is: **72**, over 2 months.", "72", True),
    ("The correct answer to the question would be 72 and not 24.", "72", True),
    ("The answer is approximately $72.", "72", True),
    ("the answer is \\(72\\).", "72", True),
    ("the answer is $x = 72$ after 2 months", "72", True),
    # boxes
    ("\\boxed{72}", "72", True),
    ("Thus $\\boxed{72}$ clips in 2 months.", "72", True),
    ("\\boxed{24} in May, so \\boxed{72}", "72", True),
    ("\\boxed{\\text{72 clips}}", "72", True),
    ("\\boxed{\\$72.00}", "72", True),
    ("\\boxed{1{,}234}", "1234", True),
    ("\\boxed{48 + 24 = 72}", "72", True),
    ("\\boxed{\\frac{3}{4}}", "0.75", True),
    ("\\boxed{-\\frac{1}{2}}", "-0.5", True),
    ("\\boxed{2\\frac{1}{2}}", "2.5", True),
    ("\\boxed{72", "72", True),
    # bold and prose
    ("Natalia sold **72 clips** in 2 months.", "72", True),
    ("**Step 1:** April gives 48.\n**Step 2:** May gives 24, so 72", "72", True),
    ("So she sold **48 + 24 = 72** in 2 months.", "72", True),
    ("Natalia sold 72 clips altogether.", "72", True),
    ("So 48 + 24 = 72 clips", "72", True),
    ("She sold 24 in May.\n\nThat is all I know!", "24", True),
    ("1. She sold 48.\n2. She sold 24.\n3. Together: 72", "72", True),
    # the shapes of numbers
    ("#### 42.0", "42", True),
    ("#### 42.5", "42", False),
    ("A: $5.00", "5", True),
    ("A: $5.01", "5", False),
    ("A: -$5", "-5", True),
    ("A: $-5", "-5", True),
    ("A: \u22125", "-5", True),
    ("The answer is negative 5.", "-5", True),
    ("The answer is 1,234", "1234", True),
    ("The answer is 1234", "#### 1,234", True),
    ("The answer is 1,234,567.50 dollars", "1234567.5", True),
    ("The answer is 12,34", "1234", False),
    ("A: 25%", "25", True),
    ("A: 25 percent", "25", True),
    ("A: 25%", "0.25", True),
    ("A: 0.25", "25%", True),
    ("A: 0.25", "25", False),
    ("A: 3/4", "0.75", True),
    ("A: 3/4 of a cup", "3/4", True),
    ("A: 1 1/2 cups", "1.5", True),
    ("A: 1½ cups", "1.5", True),
    ("A: ½", "0.5", True),
    ("A: .5", "0.5", True),
    ("A: 1/3", "0.3333333333333333", False),
    ("A: 0.1", "0.10000000000000001", False),
    ("A: 72km", "72", True),
    ("A: 5 km/h", "5", True),
    ("A: €5", "5", True),
    ("A: Rs. 500", "500", True),
    ("A: US$500", "500", True),
    ("A: 5 million", "5000000", True),
    ("A: $5k", "5000", True),
    ("A: 5 dozen", "60", True),
    ("A: 5 dozen", "5", True),
    ("A: 007", "7", True),
    ("A: 5/0", "5", False),
    ("She came 3rd with 72", "72", True),
    ("There are 72 of them, she was the 3rd", "72", True),
    ("It takes H2O and x2, so...72", "72", True),
    ("A: " + "3" * 5000, "3", False),
    # wrong
    ("#### 24", "72", False),
    ("#### 7 2", "72", False),
    ("A: 720", "72", False),
    ("A: 7", "72", False),
]  # fmt: skip


@pytest.mark.parametrize(("text", "truth", "right"), GOLDEN)
def test_the_answer_of_a_free_form_solution_is_read_as_written(text: str, truth: str, right: bool) -> None:
    verdict = verify("gsm8k", text, truth)
    assert verdict.score == float(right), verdict
    assert verdict.extracted is not None
    assert verdict.reason is None
    assert verdict.loose is None


@pytest.mark.parametrize("text", ["", "   \n", "I do not know.", "#### ", "A:", "\\boxed{}", "seventy-two", "²", "1st"])
def test_a_text_without_a_number_is_wrong_for_want_of_an_answer(text: str) -> None:
    assert verify("gsm8k", text, "72") == Verdict(0.0, None, "no_answer")


@pytest.mark.parametrize("truth", ["72", "#### 72", "work\n#### 1,234", "-5", "$5.00", "42.0", "3/4", "25%", " 72 \n"])
def test_a_ground_truth_that_is_a_number_is_accepted(truth: str) -> None:
    assert check_ground_truth("gsm8k", truth) is None


@pytest.mark.parametrize("truth", ["", "####", "abc", "#### about 72", "72 73", "1/0", "seventy", "#### 72 apples"])
def test_a_malformed_ground_truth_is_named_and_never_scored(truth: str) -> None:
    problem = check_ground_truth("gsm8k", truth)
    assert problem is not None
    assert "not a number" in problem
    verdict = verify("gsm8k", "#### 72", truth)
    assert verdict.score is None
    assert verdict.reason is not None
    assert verdict.reason.startswith("error: ValueError: not a number")


@given(st.fractions(max_denominator=10**6), st.sampled_from(["#### {}", "so\nA: {}", "\\boxed{{{}}}", "it is {}"]))
def test_every_fraction_written_out_is_read_back_exactly(value: Fraction, shape: str) -> None:
    answer = extract(shape.format(value))
    assert answer is not None
    assert answer.readings == (value,)


@given(st.decimals(min_value=-(10**12), max_value=10**12, places=2))
def test_every_amount_with_separators_is_read_back_exactly(value) -> None:
    assert verify("gsm8k", f"The answer is ${value:,} in 3 weeks.", str(value)).score == 1.0


@given(st.text(max_size=200), st.sampled_from(["#### ", "A: ", "answer is ", "\\boxed{", "**", ""]))
def test_no_text_breaks_the_extraction(text: str, marker: str) -> None:
    assert verify("gsm8k", marker + text, "72").score in (0.0, 1.0)


def test_verdicts_agree_with_the_reference_on_real_model_solutions() -> None:
    path = REFERENCE_DATA / "gsm8k_model_solutions.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set WINNOW_REFERENCE_DATA to the folder that holds it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    differing = [
        row for row in rows if (verify("gsm8k", row["solution"], row["ground_truth"]).score == 1.0) != row["is_correct"]
    ]
    assert len(rows) == 1000
    assert differing == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1,22,",
        "<<1",
        "#",
        "**1",
        "\\boxed{",
        "answer ",
        "{",
        "1 ",
        "\n",
        "A: 1\n",
        "1/",
        "-",
        "answer is x ",
        "answer: x ",
    ],
)
def test_reading_an_adversarial_text_takes_time_proportional_to_its_length(unit: str) -> None:
    assert verify("gsm8k", unit * (1_000_000 // len(unit)), "72").score == 0.0
