"""Start an unmodified SGLang server on a CPU: `python launch.py --model-path ... --device cpu ...`

Runs in the serving environment, by file path. Stand-ins take the place of what only a GPU build has (the
sgl_kernel package; torchvision, which SGLang imports for every model), and `--enable-deterministic-inference`,
which SGLang offers for GPU attention kernels alone, is made to hold on a CPU: a request with a seed gives the
same logits, to the bit, whatever else is in the batch. The sampler is SGLang's own, with its habits: see
tasks/serving/compile.py for what that means to a request.

SGLang spawns its workers with this file as their main module, so what stands at module level is in force in
each of them.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "stubs"))

# Matrix products of fewer rows go through other kernels (in fp32 below 4 rows, in bf16 at 1), which add up in
# another order. With at least this many rows each row's result was the same bits at every batch size.
MIN_ROWS = 8
# Positions of a prompt that attend in one go.
BLOCK = 64


class _Absent(type):
    """A name of a package that is not there: it can be imported and handed on, not used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("torchvision is not installed: this server takes text only")


def stand_in_for_torchvision() -> None:
    """SGLang imports torchvision for image models whatever the model; wheels for a GPU fail beside a CPU torch."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # absent, while transformers looks
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # remembers its answer
    absent = _Absent("absent", (), {})
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        module = types.ModuleType(name)
        module.__getattr__ = lambda attribute: getattr(absent, attribute)  # type: ignore[method-assign]
        sys.modules[name] = module
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[name])


def _padded(rows: Any) -> Any:
    """`rows` [n, d] with zero rows below up to MIN_ROWS."""
    import torch

    return torch.nn.functional.pad(rows, (0, 0, 0, MIN_ROWS - rows.shape[0]))


def enable_batch_invariance(*_args: Any, **_kwargs: Any) -> None:
    """Stands for SGLang's function of this purpose, whose kernels need a GPU: see MIN_ROWS."""
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    linear, lm_head = UnquantizedLinearMethod.apply, LogitsProcessor._compute_lm_head

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        if x.dim() == 2 and 0 < x.shape[0] < MIN_ROWS:
            return linear(self, layer, _padded(x), bias)[: x.shape[0]]
        return linear(self, layer, x, bias)

    def compute_lm_head(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() == 2 and 0 < hidden_states.shape[0] < MIN_ROWS:
            kwargs.pop("out", None)
            return lm_head(self, _padded(hidden_states), *args, **kwargs)[: hidden_states.shape[0]]
        return lm_head(self, hidden_states, *args, **kwargs)

    UnquantizedLinearMethod.apply = apply
    LogitsProcessor._compute_lm_head = compute_lm_head
    make_attention_batch_invariant()


def make_attention_batch_invariant() -> None:
    """Torch's attention cuts a prompt into blocks by its length, so what it puts into the cache for a prefix depends
    on the prompt that was first to have it. Here the blocks lie at fixed positions (BLOCK rows, the keys padded to
    the block's end). It is also less work: SGLang attends from every position, those in the cache too."""
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    general = TorchNativeAttnBackend._run_sdpa_forward_extend
    # row r of a block at position s sees the keys up to s + r
    triangle = torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()

    def extend(self: Any, query: Any, output: Any, k_cache: Any, v_cache: Any, req_to_token: Any,
               req_pool_indices: Any, seq_lens: Any, extend_prefix_lens: Any, extend_seq_lens: Any,
               encoder_lens: Any = None, scaling: Any = None, enable_gqa: bool = False, causal: bool = False,
               is_cross_attn: bool = False, sliding_window_size: int | None = None) -> Any:
        if not causal or is_cross_attn or encoder_lens is not None or sliding_window_size is not None:
            return general(self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                           extend_prefix_lens, extend_seq_lens, encoder_lens, scaling, enable_gqa, causal,
                           is_cross_attn, sliding_window_size)
        done = 0
        for request, end, first in zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_prefix_lens.tolist(),
                                       strict=True):
            slots = req_to_token[request, :end].long()
            whole = -(-end // BLOCK) * BLOCK
            keys, values = (_zero_padded(cache[slots], whole).to(query.dtype).transpose(0, 1)
                            for cache in (k_cache, v_cache))
            for start in range(first // BLOCK * BLOCK, end, BLOCK):
                a, b = max(start, first), min(start + BLOCK, end)
                rows = query.new_zeros(BLOCK, *query.shape[1:])
                rows[a - start : b - start] = query[done + a - first : done + b - first]
                mask = torch.nn.functional.pad(triangle, (start, 0), value=True)
                out = torch.nn.functional.scaled_dot_product_attention(
                    rows.transpose(0, 1).unsqueeze(0), keys[None, :, : start + BLOCK], values[None, :, : start + BLOCK],
                    attn_mask=mask, scale=scaling, enable_gqa=enable_gqa)
                output[done + a - first : done + b - first] = out[0].transpose(0, 1)[a - start : b - start]
            done += end - first
        return output

    TorchNativeAttnBackend._run_sdpa_forward_extend = extend


def _zero_padded(rows: Any, n: int) -> Any:
    """`rows` [m, heads, d] with zeros below, up to n rows."""
    import torch

    return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, n - rows.shape[0]))


def allow_determinism_on_cpu() -> None:
    """SGLang lists GPU kernels only; torch's own attention takes one request at a time."""
    import sglang.srt.batch_invariant_ops as batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = enable_batch_invariance


stand_in_for_torchvision()
allow_determinism_on_cpu()

if __name__ == "__main__":
    sys.argv[0] = "sglang.launch_server"
    runpy.run_module("sglang.launch_server", run_name="__main__")
