"""What SGLang makes of a dtype that is left to it: its server only says `auto`, the model's config.json says more."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from tasks.serving.guard import told
from tasks.serving.guard.same_model import is_folder, snapshot


def model_dtype(*models: str | None) -> str | None:
    """The number format of the first of these models (folders, or ids in the hub's cache) whose config.json is at hand;
    None where none is, or where it does not say."""
    for model in models:
        if model and (config := _config(model)) is not None:
            return _left_open(config)
    return None


def _config(model: str) -> dict[str, Any] | None:
    path: Any = Path(model).expanduser() / "config.json"
    with contextlib.suppress(OSError, ValueError):
        if not path.is_file() and not is_folder(model):
            from huggingface_hub import try_to_load_from_cache

            name, commit = snapshot(model)
            path = try_to_load_from_cache(name, "config.json", revision=commit)
        config = json.loads(Path(path).read_bytes()) if isinstance(path, (str, Path)) else None
        return config if isinstance(config, dict) else None
    return None


def _left_open(config: dict[str, Any]) -> str | None:
    """As SGLang 0.5.23 has it (`_get_and_verify_dtype`): the file's own, but half of float32. A model of several parts
    is more than that rule."""
    if any(name.endswith("_config") and isinstance(part, dict) and "hidden_size" in part
           for name, part in config.items()):
        return None
    found = told.dtype(config.get("dtype") or config.get("torch_dtype")) or "float32"
    if found != "float32":
        return found
    return "bfloat16" if str(config.get("model_type", "")).startswith("gemma") else "float16"
