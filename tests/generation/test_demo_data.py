from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"
FIELDS = {
    "word_problems": {"question", "answer"},
    "latex_math": {"problem", "solution"},
    "constraints": {"prompt", "instruction_id_list", "kwargs"},
    "stories": {"prompt"},
    "chat": {"messages"},
}
ROWS = {"word_problems": 4, "latex_math": 4, "constraints": 4, "stories": 3, "chat": 3}

# Worked out from the questions, not read from the answers.
WORD_PROBLEM_RESULTS = {"Mia": 3 + 4, "baker": 12 - 4, "candles": 2 * 6, "walnuts": 10 // 2}
LATEX_RESULTS = {"8 + 5": Fraction(8 + 5), "2^3": Fraction(2**3), "x + 2 = 5": Fraction(5 - 2),
                 r"\frac{2}{4}": Fraction(2, 4)}

# An answer a person would give to each row of constraints.jsonl, and one that breaks every instruction of it.
CONSTRAINT_ANSWERS = [
    ("Lamps shimmer in the puddles of an empty street.", "Wet, grey, and empty."),
    ("* bread\n* cheese\n* a blanket", "Bread, cheese and a blanket."),
    ("people plant trees for shade and so that birds have a home.", "Trees clean the Air."),
    ("Put a slice of bread into the toaster and press the lever down. Wait two minutes until it pops up "
     "golden and crisp. Then spread a little butter on it while it is still hot. Enjoy it warm.",
     "Use a toaster."),
]


def load(name: str) -> list[dict[str, Any]]:
    text = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def prompt_texts(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row[key] for key in ("question", "problem", "prompt") if key in row]


def by_key(results: dict[str, Any], prompt: str) -> Any:
    matching = [value for key, value in results.items() if key in prompt]
    assert len(matching) == 1, f"the table names {prompt!r} {len(matching)} times"
    return matching[0]


def test_the_folder_holds_the_files_the_readme_describes() -> None:
    assert {path.stem for path in DEMO.glob("*.jsonl")} == set(FIELDS)
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    for name, rows in ROWS.items():
        assert f"| `{name}.jsonl` | {rows} |" in readme


@pytest.mark.parametrize("name", FIELDS)
def test_every_row_has_the_fields_of_its_kind(name: str) -> None:
    rows = load(name)
    assert len(rows) == ROWS[name]
    assert all(set(row) == FIELDS[name] for row in rows)


def test_prompts_are_short_and_no_two_are_alike() -> None:
    prompts = ["\n".join(prompt_texts(row)) for name in FIELDS for row in load(name)]
    assert len(prompts) == len(set(prompts)) == 18
    # Words and punctuation marks: close to, and for these texts not far below, a tokenizer's count.
    assert max(len(re.findall(r"\w+|[^\w\s]", prompt)) for prompt in prompts) < 60
    assert all(prompt == prompt.strip() for prompt in prompts)


def test_word_problems_end_in_the_right_number() -> None:
    for row in load("word_problems"):
        expected = by_key(WORD_PROBLEM_RESULTS, row["question"])
        worked, marked = row["answer"].split("\n#### ")
        assert marked == str(expected)
        left, operator, right, result = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", worked)[0]
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right),
                 "/": int(left) / int(right)}[operator]
        assert value == int(result) == expected


def test_latex_solutions_box_the_right_result() -> None:
    for row in load("latex_math"):
        (boxed,) = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", row["solution"])
        fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", boxed)
        value = Fraction(*map(int, fraction.groups())) if fraction else Fraction(boxed)
        assert value == by_key(LATEX_RESULTS, row["problem"])
        assert r"\boxed{}" in row["problem"]


def test_each_constraint_has_its_arguments_and_two_rows_have_two() -> None:
    rows = load("constraints")
    assert all(len(row["instruction_id_list"]) == len(row["kwargs"]) for row in rows)
    assert sorted(len(row["instruction_id_list"]) for row in rows) == [1, 1, 2, 2]


def test_constraints_can_be_met_and_broken_by_the_official_checkers() -> None:
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    for row, (good, bad) in zip(load("constraints"), CONSTRAINT_ANSWERS, strict=True):
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            checker = registry.INSTRUCTION_DICT[name](name)
            checker.build_description(**arguments)
            assert checker.check_following(good), f"{name} refuses {good!r}"
            assert not checker.check_following(bad), f"{name} accepts {bad!r}"


def test_conversations_alternate_and_end_with_the_user() -> None:
    conversations = [[message["role"] for message in row["messages"]] for row in load("chat")]
    assert sorted(map(len, conversations)) == [1, 1, 3]
    for roles in conversations:
        assert roles == (["user", "assistant"] * len(roles))[:len(roles)]
        assert roles[-1] == "user"
    assert all(set(message) == {"role", "content"} for row in load("chat") for message in row["messages"])
