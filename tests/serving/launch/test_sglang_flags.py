"""Command lines against the argument parser of the SGLang that is installed (which is not started)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tasks.serving.launch import flags_probe
from tasks.serving.launch.flags import Capabilities, LaunchRefused, render
from tasks.serving.launch.launch_spec import CPU_LAUNCHER, LaunchSpec, command_line, environment
from tests.serving.launch.sglang_flags import KNOWN, names_of
from tests.serving.launch.test_launch_spec import DRAFTED, OWN, WORDS, engines, launches, specs

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(300)]
SPEC = LaunchSpec(model="org/name", device="cpu", python=sys.executable)

# Answers each line (a command line) with what SGLang makes of it: its record's field for each option named.
SERVER = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs, prepare_server_args
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
actions = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
field = {name: a.dest for a in actions for name in a.option_strings}
out = sys.stdout
sys.stdout = sys.stderr
def say(what):
    out.write(json.dumps(what, default=str) + chr(10)); out.flush()
say([{"names": a.option_strings, "choices": a.choices and [str(c) for c in a.choices], "nargs": a.nargs,
      "type": getattr(a.type, "__name__", None), "dest": a.dest} for a in actions])
for line in sys.stdin:
    argv = json.loads(line)
    try:
        args = prepare_server_args(argv)
        names = [word.partition("=")[0] for word in argv]
        say({name: getattr(args, field[name], None) for name in names})
    except (SystemExit, Exception) as error:
        say({"error": repr(error)})
"""
Ask = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[list[dict[str, Any]], Ask]]:
    """SGLang's parser in a process of its own: its options, and what it says of a command line."""
    env = os.environ | environment(SPEC) | {"PYTHONPATH": str(CPU_LAUNCHER.parent / "stubs")}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdin and running.stdout
        into, out = running.stdin, running.stdout

        def ask(argv: list[str]) -> dict[str, Any]:
            into.write(json.dumps(argv) + "\n")
            into.flush()
            return json.loads(out.readline())

        yield json.loads(out.readline()), ask
        into.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the installed SGLang's answer is kept, asked as a launch asks it."""
    folder = tmp_path_factory.mktemp("flags")
    flags_probe._KNOWN.clear()  # whoever launched before in this process has asked
    command_line(SPEC, 1, cache_dir=folder)
    return folder


@pytest.fixture(scope="module")
def known(cache: Path) -> Capabilities:
    """The flags of the installed SGLang."""
    kept = flags_probe._kept(next(cache.glob("*.json")))
    assert kept
    return kept


def test_the_probe_agrees_with_sglangs_own_parser(process: tuple[list[dict[str, Any]], Ask],
                                                  known: Capabilities) -> None:
    kind = {0: "none", "?": "optional", "*": "optional"}
    expected = [(a["names"], kind.get(a["nargs"], "required"), {*(a["choices"] or ())}) for a in process[0]]
    assert len(expected) > 400
    assert [([*o.names], o.value, {*(o.choices or ())}) for o in known.options] == expected


def test_the_help_text_of_the_other_tests_is_this_sglangs(known: Capabilities) -> None:
    there = {option.names: (option.value, {*(option.choices or ())}) for option in known.options}  # in any order
    assert {option.names: (option.value, {*(option.choices or ())}) for option in KNOWN.options}.items() <= there.items()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(launches(), engines())
def test_sglang_accepts_every_configs_command_line_and_holds_what_was_asked(
        process: tuple[list[dict[str, Any]], Ask], known: Capabilities, launch: dict[str, Any],
        generation: dict[str, Any]) -> None:
    for n, spec in enumerate(specs(launch, generation)):
        line = command_line(dataclasses.replace(spec, python="/py"), 7 + n, known)
        got = process[1](line.argv[2 if spec.device == "cpu" else 4:])
        assert "error" not in got, got
        assert all("no-such-flag" in warning for warning in line.warnings)
        # dtype float32 stays that; port and numbers are numbers
        said = {name: str(value) for name, value in got.items()}
        for key, flag in OWN.items():
            if key in launch and launch[key] != "auto":
                assert said[f"--{flag}"] == WORDS.get(str(launch[key]), str(launch[key])), flag
        guess = launch.get("speculation", {})
        for key, flag in DRAFTED.items():
            if key in guess:
                assert said[f"--speculative-{flag}"] == str(guess[key]), flag
        if guess.get("algorithm", "off") != "off":
            assert said["--speculative-algorithm"] == guess["algorithm"].upper()
        assert said.get("--enable-deterministic-inference", "False") == str(launch.get("deterministic", True))
        assert said.get("--enable-custom-logit-processor", "False") == str(launch.get("custom_processors", True))
        assert said["--port"] == str(7 + n)
        assert said["--device"] == spec.device and said.get("--base-gpu-id", "None") == str(spec.gpu)


VALUES = {"int": st.integers(-5, 10**6), "float": st.floats(-9, 9), "str": st.text(st.characters(codec="ascii",
                                                                                            categories=["L", "N", "P"]))}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_sglang_accepts_every_flag_that_it_knows(process: tuple[list[dict[str, Any]], Ask], known: Capabilities,
                                                 data: st.DataObject) -> None:
    owners = {a["dest"]: a for a in reversed(process[0])}  # a deprecated option may write into another's field
    able = [a for a in owners.values() if a["nargs"] == 0 or (a["nargs"] is None and (a["choices"] or a["type"] in
                                                                                      VALUES))]
    some = [able[i] for i in data.draw(st.lists(st.integers(0, len(able) - 1), max_size=15, unique=True))]
    values = [True if a["nargs"] == 0 else data.draw(st.sampled_from(a["choices"]) if a["choices"] else VALUES[
        a["type"]]) for a in some]
    asked = [(data.draw(st.sampled_from(a["names"])).lstrip("-").upper(), value)
             for a, value in zip(some, values, strict=True)]
    assume(not any(name in ("CONFIG", "MODEL", "MODEL-PATH", "LOG-LEVEL") or "BREADTH" in name for name, _ in asked))
    try:
        rendered = render([("model", "org/name"), *asked], known)
    except LaunchRefused as error:
        assert "they go together" in str(error)
        return
    assert not rendered.warnings and len(rendered.argv) == len(asked) + 1
    got = process[1](list(rendered.argv))
    assert "error" not in got, (got, rendered.argv)
    for name, (_, value) in zip(names_of(rendered.argv)[1:], asked, strict=True):
        if value is not True:
            assert str(got[name]) == str(value), name


def test_sglangs_own_word_against_a_wrong_one(process: tuple[list[dict[str, Any]], Ask]) -> None:
    """The parser of these tests does refuse."""
    assert "error" in process[1](["--model-path=org/name", "--dtype=x"])
    assert process[1](["--model-path=org/name"]) == {"--model-path": "org/name"}


def test_the_next_process_does_not_ask_again(cache: Path, known: Capabilities, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags_probe, "_KNOWN", {})
    monkeypatch.setattr(flags_probe, "_asked", lambda *_: pytest.fail("asked again"))
    again = dataclasses.replace(SPEC, model="other/name", threads=2)
    assert command_line(again, 1, cache_dir=cache) == command_line(again, 1, known)
