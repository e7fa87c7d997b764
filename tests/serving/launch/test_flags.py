"""Flags: what a help text says, and command lines that a parser of those very flags accepts."""

from __future__ import annotations

import argparse
import os
import string
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.serving.launch import flags_probe
from tasks.serving.launch.flags import Capabilities, LaunchFailed, LaunchRefused, Option, Value, render
from tasks.serving.launch.flags_probe import probe
from tests.serving.launch.sglang_flags import KNOWN, FakeSGLang, add, names_of, parser, read, without

# --- what a help text says ---


@pytest.mark.parametrize(("name", "expected"), [
    ("model-path", Option(("--model-path", "--model"), "required")),
    ("ep", Option(("--ep-size", "--expert-parallel-size", "--ep"), "required")),
    ("is-embedding", Option(("--is-embedding",), "none")),
    ("nnodes", Option(("--nnodes",), "required")),  # its help begins on the same line
    ("enable-tf32-matmul", Option(("--enable-tf32-matmul", "--no-enable-tf32-matmul"), "none")),
    ("dtype", Option(("--dtype",), "required", ("auto", "half", "float16", "bfloat16", "float", "float32"))),
    ("max-lora-chunk-size", Option(("--max-lora-chunk-size",), "required", ("16", "32", "64", "128"))),
    ("model-checksum", Option(("--model-checksum",), "optional")),
    ("lora-paths", Option(("--lora-paths",), "optional")),
    ("allowed-media-domains", Option(("--allowed-media-domains",), "required")),
])
def test_the_real_help_text_is_understood(name: str, expected: Option) -> None:
    assert KNOWN.find(name) == (expected, False)


def test_the_real_help_text_has_no_option_too_many() -> None:
    assert len(KNOWN.options) == 59 and KNOWN.find("help") is None


def test_choices_of_a_list_are_its_elements() -> None:
    found = KNOWN.find("lora-target-modules")
    assert found and found[0].value == "optional" and found[0].choices
    assert found[0].choices[:2] == ("q_proj", "k_proj") and found[0].choices[-1] == "all"


def test_the_format_of_python_3_13_is_understood() -> None:
    text = "options:\n  -h, --help            show\n  -t, --tp-size, --tensor-parallel-size TP_SIZE\n" \
           "                        The size.\n  --dtype, --type {a,b}  Which.\n"
    assert Capabilities.parse(text).options == (
        Option(("-t", "--tp-size", "--tensor-parallel-size"), "required"), Option(("--dtype", "--type"), "required",
                                                                                  ("a", "b")))


WORDS = st.text(string.ascii_lowercase, min_size=2, max_size=8)
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(lambda words: "--" + "-".join(words))


@st.composite
def some_options(draw: st.DrawFn) -> list[Option]:
    """Options of every kind, no name twice."""
    names = draw(st.lists(NAMES, min_size=1, max_size=12, unique=True).filter(
        lambda all_names: "--help" not in all_names and not any(name.startswith("--no-") for name in all_names)))
    out = []
    while names:
        own = tuple(names.pop() for _ in range(min(len(names), draw(st.integers(1, 3)))))
        value = draw(st.sampled_from(("none", "optional", "required", "negative")))
        if value == "negative":
            out.append(Option((*own, *(f"--no-{name[2:]}" for name in own)), "none"))
        else:
            choices = draw(st.none() | st.lists(WORDS, min_size=1, max_size=5, unique=True).map(tuple))
            out.append(Option(own, value, None if value == "none" else choices))
    return out


@given(some_options(), st.integers(40, 250), st.text(string.printable, max_size=300))
def test_whatever_argparse_prints_is_read_as_it_was_meant(options: list[Option], columns: int, about: str) -> None:
    made = argparse.ArgumentParser(prog="x", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=columns))
    for option in options:
        add(made, option)
        made._actions[-1].help = about.replace("%", "%%")
    found = Capabilities.parse(made.format_help()).options
    key = lambda option: (set(option.names), option.value, option.choices)  # noqa: E731
    assert [key(option) for option in found] == [key(option) for option in options]


# --- names ---


@pytest.mark.parametrize("name", ["tp-size", "--tp-size", "TP_Size", " --tp_size ", "tensor-parallel-size", "tp",
                                  "tensor_par"])
def test_an_option_is_found_however_it_is_spelled(name: str) -> None:
    assert render([(name, 2)], KNOWN).argv == ("--tp-size=2",)


def test_a_beginning_of_several_options_is_refused_with_those_it_could_be() -> None:
    with pytest.raises(LaunchRefused, match="ssl-certfile, --ssl-keyfile; write the name out"):
        render([("ssl", "x")], KNOWN)


def test_the_beginning_of_one_option_that_is_another_options_name_is_that_other() -> None:
    known = Capabilities.parse("  --tp TP\n  --tp-size TP_SIZE\n")
    assert render([("tp", 2)], known).argv == ("--tp=2",)


def test_a_name_that_is_sure_is_not_taken_for_the_beginning_of_another() -> None:
    known = Capabilities.parse("  --revision-of-code X\n")
    assert render([("revision", "abc")], known).argv == ("--revision-of-code=abc",)
    rendered = render([("Revision", "abc")], known, sure=["revision"])
    assert rendered.argv == () and rendered.warnings == ("this SGLang has no --revision: started without it.",)


def test_an_unknown_option_is_left_out_with_a_warning_that_names_it_and_what_is_near() -> None:
    rendered = render([("enable_metrix", True), ("tp", 2)], KNOWN)
    assert rendered.argv == ("--tp-size=2",)
    assert rendered.warnings == ("this SGLang has no --enable-metrix: started without it, did you mean "
                                 "'--enable-metrics'?",)


def test_the_later_of_two_spellings_counts() -> None:
    rendered = render([("tp-size", 1), ("enable-metrics", True), ("tensor_parallel_size", 2), ("TP", 4)], KNOWN)
    assert sorted(rendered.argv) == ["--enable-metrics", "--tp-size=4"] and not rendered.warnings


# --- values ---


@pytest.mark.parametrize(("name", "value", "word"), [
    ("skip-server-warmup", True, "--skip-server-warmup"),
    ("skip-server-warmup", False, None),
    ("enable-tf32-matmul", True, "--enable-tf32-matmul"),
    ("enable-tf32-matmul", False, "--no-enable-tf32-matmul"),
    ("no-enable-tf32-matmul", True, "--no-enable-tf32-matmul"),
    ("no-enable-tf32-matmul", False, None),
    ("tp-size", False, None),
    ("chunked-prefill-size", -1, "--chunked-prefill-size=-1"),
    ("random-seed", 0, "--random-seed=0"),
    ("json-model-override-args", '{"a": [1, 2]}', '--json-model-override-args={"a": [1, 2]}'),
    ("chat-template", "--odd name", "--chat-template=--odd name"),
    ("chat-template", "", "--chat-template="),
    ("model-checksum", True, "--model-checksum"),
    ("model-checksum", "sums.json", "--model-checksum=sums.json"),
    ("dtype", " BFloat16", "--dtype=bfloat16"),
    ("max-lora-chunk-size", 32, "--max-lora-chunk-size=32"),
    ("speculative-ngram-match-type", "bfs", "--speculative-ngram-match-type=BFS"),
])
def test_a_value_becomes_one_word(name: str, value: Value, word: str | None) -> None:
    rendered = render([(name, value)], KNOWN)
    assert rendered.argv == ((word,) if word else ()) and not rendered.warnings
    if word:
        read(rendered.argv, KNOWN)


def test_false_takes_away_what_was_asked_before() -> None:
    assert render([("tp-size", 2), ("enable-metrics", True), ("tp", False), ("enable_metrics", False)], KNOWN).argv == ()
    assert render([("no-enable-tf32-matmul", True), ("enable-tf32-matmul", True)], KNOWN).argv == (
        "--enable-tf32-matmul",)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("dtype", "bfloat61", r"flag dtype: --dtype cannot be 'bfloat61', did you mean 'bfloat16'\? It is one of auto, "
                          "half, float16, bfloat16, float, float32"),
    ("sampling_backend", "xyz", r"--sampling-backend cannot be 'xyz'; It is one of flashinfer"),
    ("max-lora-chunk-size", 33, "cannot be 33"),
    ("tp", True, "flag tp: --tp-size wants a value; true is for"),
    ("dtype", True, r"--dtype wants a value \(auto, half"),
    ("enable-metrics", "yes", "--enable-metrics takes no value, and 'yes' was given; say true or false"),
    ("enable-metrics", 1, "--enable-metrics takes no value"),
    ("no-enable-tf32-matmul", 0, "--no-enable-tf32-matmul takes no value"),
])
def test_a_value_that_an_option_cannot_have_is_refused(name: str, value: Value, message: str) -> None:
    with pytest.raises(LaunchFailed, match=message):
        render([(name, value)], KNOWN)


# --- flags that go together ---

EAGLE = [("speculative-algorithm", "EAGLE"), ("speculative-draft-model-path", "org/draft"),
         ("speculative-num-steps", 3), ("speculative-eagle-topk", 2), ("speculative-num-draft-tokens", 6)]
NGRAM = [("speculative-algorithm", "NGRAM"), ("speculative-num-draft-tokens", 8),
         ("speculative-ngram-min-bfs-breadth", 2), ("speculative-ngram-max-bfs-breadth", 4)]


def test_speculation_is_whole_where_everything_is_known() -> None:
    assert render(EAGLE, KNOWN).argv == tuple(f"--{name}={value}" for name, value in EAGLE)
    assert render(NGRAM, KNOWN).argv == tuple(f"--{name}={value}" for name, value in NGRAM)


def test_one_lacking_number_of_a_draft_takes_the_three_away() -> None:
    rendered = render(EAGLE, without("speculative-eagle-topk"))
    assert rendered.argv == ("--speculative-algorithm=EAGLE", "--speculative-draft-model-path=org/draft")
    assert rendered.warnings == (
        "this SGLang has no --speculative-eagle-topk: started without --speculative-num-steps, "
        "--speculative-eagle-topk, --speculative-num-draft-tokens, which go together",)


@pytest.mark.parametrize("lacking", ["speculative-algorithm", "speculative-draft-model-path"])
def test_without_what_guesses_nothing_is_guessed(lacking: str) -> None:
    rendered = render([*EAGLE, ("enable-metrics", True)], without(lacking))
    assert rendered.argv == ("--enable-metrics",) and len(rendered.warnings) == 1
    assert all(f"--{name}" in rendered.warnings[0] for name, _ in EAGLE)


def test_an_algorithm_that_an_older_sglang_lacks_is_left_out_and_named() -> None:
    old = Capabilities((*without("speculative-algorithm").options,
                        Option(("--speculative-algorithm",), "required", ("EAGLE", "NEXTN"))))
    assert render([("speculative-algorithm", "eagle")], old).argv == ("--speculative-algorithm=EAGLE",)
    rendered = render(NGRAM, old)
    assert rendered.argv == ()
    assert rendered.warnings[0].startswith("this SGLang has no --speculative-algorithm=NGRAM: started without")


def test_a_draft_wants_all_of_its_numbers_or_none() -> None:
    with pytest.raises(LaunchRefused, match="--speculative-num-steps without --speculative-eagle-topk, --speculative-"
                                            "num-draft-tokens"):
        render(EAGLE[:3], KNOWN)
    assert len(render(EAGLE[:2], KNOWN).argv) == 2
    assert len(render(NGRAM[:2], KNOWN).argv) == 2  # guesses from a table have one of them


@pytest.mark.parametrize(("given", "words"), [((3, None), (3, 10)), ((12, None), (12, 12)), ((None, 4), (1, 4)),
                                              ((2, 4), (2, 4)), ((4, 4), (4, 4))])
def test_breadths_come_in_twos_and_in_order(given: tuple[int | None, int | None], words: tuple[int, int]) -> None:
    names = ("speculative_ngram_min_bfs_breadth", "speculative_ngram_max_bfs_breadth")
    asked = [(name, value) for name, value in zip(names, given, strict=True) if value is not None]
    assert render(asked, KNOWN).argv == (f"--speculative-ngram-min-bfs-breadth={words[0]}",
                                         f"--speculative-ngram-max-bfs-breadth={words[1]}")


def test_breadths_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(LaunchRefused, match=r"min-bfs-breadth \(5\) is above .*max-bfs-breadth \(4\)"):
        render([(NGRAM[2][0], 5), (NGRAM[3][0], 4)], KNOWN)


@pytest.mark.parametrize("lacking", ["speculative-ngram-min-bfs-breadth", "speculative-ngram-max-bfs-breadth"])
@pytest.mark.parametrize("asked", [NGRAM, NGRAM[:3], [*NGRAM[:2], NGRAM[3]]])
def test_one_lacking_breadth_takes_the_other_away(lacking: str, asked: list[tuple[str, Value]]) -> None:
    rendered = render(asked, without(lacking))
    assert rendered.argv == ("--speculative-algorithm=NGRAM", "--speculative-num-draft-tokens=8")
    assert len(rendered.warnings) == 1 and f"no --{lacking}: started without" in rendered.warnings[0]


@pytest.mark.parametrize(("asked", "lacking"), [
    ([("nnodes", 2), ("node-rank", 0), ("dist-init-addr", "10.0.0.1:5")], "dist-init-addr"),
    ([("ssl-keyfile", "k"), ("ssl-certfile", "c")], "ssl-certfile"),
    ([("speculative-draft-window-size", 64), ("speculative-draft-sink-size", 4)], "speculative-draft-sink-size"),
])
def test_other_flags_that_go_together_go_together(asked: list[tuple[str, Value]], lacking: str) -> None:
    assert len(render(asked, KNOWN).argv) == len(asked)
    rendered = render(asked, without(lacking))
    assert rendered.argv == () and len(rendered.warnings) == 1
    assert all(f"--{name}" in rendered.warnings[0] for name, _ in asked)


@pytest.mark.parametrize("alone", ["ssl-keyfile", "ssl-certfile", "speculative-draft-sink-size"])
def test_a_flag_that_is_of_no_use_alone_is_refused_alone(alone: str) -> None:
    with pytest.raises(LaunchRefused, match=f"--{alone} without --.*they go together"):
        render([(alone, "4")], KNOWN)


# --- every command line ---


def spelled(name: str, way: int) -> str:
    return [name, name.upper(), name.replace("-", "_"), f"--{name}", f" -{name.title()} "][way % 5]


@st.composite
def some_flags(draw: st.DrawFn) -> list[tuple[str, Value]]:
    out: list[tuple[str, Value]] = []
    for option in draw(st.lists(st.sampled_from(KNOWN.options), max_size=12)):
        name = spelled(draw(st.sampled_from(option.names)).lstrip("-"), draw(st.integers(0, 4)))
        some = st.sampled_from(option.choices) if option.choices else st.text(
            st.characters(codec="utf-8", exclude_characters="\0")) | st.integers()
        text: st.SearchStrategy[Any] = {"none": st.just(True), "required": some, "optional": some | st.just(True)}[
            option.value]
        out.append((name, draw(text | st.just(False))))
    return [flag for flag in out if "bfs-breadth" not in flag[0].lower().replace("_", "-")]


@given(some_flags(), st.sets(st.sampled_from([option.name for option in KNOWN.options]), max_size=20))
def test_every_command_line_is_accepted_and_says_what_was_asked(asked: list[tuple[str, Value]],
                                                                lacking: set[str]) -> None:
    known = without(*(name.lstrip("-") for name in lacking))
    expected: dict[str, Value] = {}
    for name, value in asked:
        plain = "--" + name.strip().strip("-").replace("_", "-").lower()
        option = next(option for option in KNOWN.options if plain in option.names)
        expected.pop(option.name[2:], None)
        if option not in known.options or (value is False and (plain in option.negatives or not option.negatives)):
            continue
        expected[option.name[2:]] = False if plain in option.negatives else value if isinstance(value, bool) else str(
            value)
    try:
        rendered = render(asked, known, sure=[name.strip().strip("-").replace("_", "-").lower() for name, _ in asked])
    except LaunchRefused as error:
        assert "they go together" in str(error)  # one of two, drawn alone
        return
    named = names_of(rendered.argv)
    assert len({known.find(name, whole=True) for name in named}) == len(named)
    left_out = {name for name in expected if any(f"--{name}" in warning for warning in rendered.warnings)}
    got = read(rendered.argv, known)
    assert got == {name: value for name, value in expected.items() if name in got}
    assert set(got) == set(expected) - left_out
    assert {n.lstrip("-") for n in named} <= {n.lstrip("-") for option in known.options for n in option.names}


@given(st.none() | st.integers(1, 40), st.none() | st.integers(1, 40))
def test_breadths_are_both_there_in_order_or_refused(least: int | None, most: int | None) -> None:
    asked = [(name, value) for (name, _), value in zip(NGRAM[2:], (least, most), strict=True) if value is not None]
    if least and most and least > most:
        with pytest.raises(LaunchRefused):
            render(asked, KNOWN)
        return
    got = read(render(asked, KNOWN).argv, KNOWN)
    numbers = [int(got[name]) for name, _ in NGRAM[2:] if name in got]
    assert len(numbers) == (2 if least or most else 0) and numbers == sorted(numbers)
    assert all(str(value) == got[name] for name, value in asked)


# --- asking an installed SGLang ---


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSGLang:
    monkeypatch.setattr(flags_probe, "_KNOWN", {})
    return FakeSGLang(tmp_path)


def again(sglang: FakeSGLang, cache: Path | None, monkeypatch: pytest.MonkeyPatch) -> Capabilities:
    """Asked by a process that has not asked yet."""
    monkeypatch.setattr(flags_probe, "_KNOWN", {})
    return probe([str(sglang.python), "-m", "sglang"], cache_dir=cache)


def test_an_installed_sglang_is_asked_once_in_a_process(sglang: FakeSGLang) -> None:
    start = [str(sglang.python), "-P", "-m", "sglang.launch_server"]
    assert probe(start, {"A": "1"}) == KNOWN == probe(start, {"A": "1"})
    assert sglang.log.read_text() == "-P -m sglang.launch_server --help\n"
    probe(start, {"A": "2"})
    assert sglang.times_asked == 2


def test_the_answer_is_kept_on_disk_until_that_sglang_changes(sglang: FakeSGLang, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache" / "deep"
    assert again(sglang, cache, monkeypatch) == again(sglang, cache, monkeypatch) == KNOWN
    assert sglang.times_asked == 1
    sglang.answers("  --new NEW\n")
    os.utime(sglang.source, ns=(5, 5))
    assert again(sglang, cache, monkeypatch).options == (Option(("--new",), "required"),)
    sglang.source.parent.joinpath("arg_groups", "more.py").write_text("")
    again(sglang, cache, monkeypatch)
    assert sglang.times_asked == 3 and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("left", ["", "[", "[]", "{}", "[1]", '[{"names": ["--x"]}]'])
def test_a_torn_answer_on_disk_is_asked_for_again(sglang: FakeSGLang, left: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    again(sglang, cache, monkeypatch)
    next(cache.iterdir()).write_text(left)
    assert again(sglang, cache, monkeypatch) == KNOWN
    assert again(sglang, cache, monkeypatch) == KNOWN and sglang.times_asked == 2


def test_a_folder_that_cannot_be_written_is_no_failure(sglang: FakeSGLang, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert again(sglang, tmp_path / "file" / "cache", monkeypatch) == KNOWN


def test_an_sglang_that_cannot_be_told_apart_is_not_kept_on_disk(sglang: FakeSGLang, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    sglang.source.unlink()
    assert again(sglang, tmp_path / "cache", monkeypatch) == again(sglang, tmp_path / "cache", monkeypatch) == KNOWN
    assert sglang.times_asked == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("code", "message"), [
    ("import sys; sys.exit(\"/py: No module named 'sglang'\")", "(?s)code 1: its Python has no SGLang; run `make "
     r"install-sglang`.*launch\.python.*\n  \| /py: No module"),
    ("print('  --x X'); print('torch is broken'); raise SystemExit(3)", r"(?s)ended with code 3\n.*torch is broken"),
    ("print('hello')", r"(?s)names no flags\n  \| hello"),
])
def test_a_probe_that_fails_says_why(sglang: FakeSGLang, code: str, message: str) -> None:
    sglang.does(code)
    with pytest.raises(LaunchFailed, match=message):
        probe([str(sglang.python)])


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(LaunchFailed, match=r"cannot run /nowhere/python \(No such file.*launch\.python"):
        probe(["/nowhere/python", "-m", "x"])


def test_a_probe_that_hangs_is_given_up(sglang: FakeSGLang) -> None:
    sglang.does("import time; time.sleep(60)")
    began = time.monotonic()
    with pytest.raises(LaunchFailed, match=r"did not answer within 0\.5 s"):
        probe([str(sglang.python)], timeout_s=0.5)
    assert time.monotonic() - began < 10


def test_a_probe_sees_its_environment_and_not_the_terminals_width(sglang: FakeSGLang,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "7")
    sglang.does("import os; print('  --' + os.environ['MINE'] + os.environ['COLUMNS'])")
    assert probe([str(sglang.python)], {"MINE": "it"}).options == (Option(("--it100",), "none"),)


def test_a_probe_does_not_wait_for_input(sglang: FakeSGLang) -> None:
    sglang.does("import sys; print('  --' + sys.stdin.read() + 'x')")
    terminal, nobody_writes = os.pipe()
    kept = os.dup(0)
    os.dup2(terminal, 0)
    try:
        assert probe([str(sglang.python)], timeout_s=20).options == (Option(("--x",), "none"),)
    finally:
        os.dup2(kept, 0)
        for handle in (kept, terminal, nobody_writes):
            os.close(handle)


def test_the_parser_of_these_tests_refuses_what_it_does_not_know() -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parser(without("tp-size")).parse_args(["--tp-size=2"])
