"""What the tests of flags share: a stand-in for an installed SGLang's command line, and parsers that read ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.serving.launch.flags import Capabilities, Option

HELP = (Path(__file__).parent / "sglang_help.txt").read_text()
"""Cut from what `python -m sglang.launch_server --help` of SGLang 0.5.23 prints."""
KNOWN = Capabilities.parse(HELP)

_SCRIPT = '''#!{python}
import sys
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(a for a in args if len(a) < 200) + chr(10))
if "-c" in args:
    sys.path.insert(0, {packages!r})
    exec(args[args.index("-c") + 1])
else:
    exec(open({body!r}).read())
'''


class FakeSGLang:
    """An interpreter whose SGLang prints a help text of ours."""

    def __init__(self, folder: Path, help_text: str = HELP) -> None:
        self.python, self.log, self.body = folder / "python", folder / "asked.log", folder / "body.py"
        self.source = folder / "packages" / "sglang" / "srt" / "server_args.py"
        self.source.parent.joinpath("arg_groups").mkdir(parents=True)
        self.source.write_text("x = 1\n")
        self.source.parents[1].joinpath("__init__.py").write_text("raise ImportError('it is to be found, not imported')")
        about = folder / "packages" / "sglang-9.9.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9\n")
        self.python.write_text(_SCRIPT.format(python=sys.executable, log=str(self.log), body=str(self.body),
                                              packages=str(folder / "packages")))
        self.python.chmod(0o755)
        self.answers(help_text)

    def answers(self, help_text: str) -> None:
        self.does(f"print({help_text!r})")

    def does(self, code: str) -> None:
        self.body.write_text(code)

    @property
    def times_asked(self) -> int:
        return self.log.read_text().count("--help") if self.log.exists() else 0


def without(*names: str) -> Capabilities:
    """A SGLang that lacks these options."""
    return Capabilities(tuple(option for option in KNOWN.options if not {f"--{name}" for name in names} & {
        *option.names}))


def parser(known: Capabilities) -> argparse.ArgumentParser:
    """A real argparse parser with the same options; their texts and truth values under their first name."""
    out = argparse.ArgumentParser(prog="sglang serve", exit_on_error=False)
    for option in known.options:
        add(out, option)
    return out


def add(to: argparse.ArgumentParser, option: Option) -> None:
    keywords: dict[str, Any] = {"dest": option.name.lstrip("-"), "default": None}
    if option.value == "none":
        keywords["action"] = argparse.BooleanOptionalAction if option.negatives else "store_true"
    else:
        keywords |= {"nargs": "?" if option.value == "optional" else None, "const": True, "choices": option.choices}
        if option.value == "required":
            del keywords["const"]
    names = [name for name in option.names if name not in option.negatives]
    to.add_argument(*names, **keywords)


def read(argv: Sequence[str], known: Capabilities) -> dict[str, Any]:
    """What the parser makes of a command line's options; those that were not given are absent."""
    return {name: value for name, value in vars(parser(known).parse_args(list(argv))).items() if value is not None}


def names_of(argv: Sequence[str]) -> list[str]:
    """Each option's name in a command line."""
    return [word.partition("=")[0] for word in argv if word.startswith("--")]
