"""From a heuristic to what an SGLang server executes: native parameters or the custom processor.

Native where the engine's result is the heuristic's, whatever else is in its batch:

- temperature alone, always;
- one of top_k, top_p, min_p after a temperature, where the server does not honour seeds.

Everything else goes to the custom processor, which applies the steps in their order:

- typical, epsilon and eta, which the engine lacks;
- combinations: the engine's pytorch backend joins top_k and top_p (both cut the original
  probabilities) and its flashinfer backend changes rule with its batch, so only the processor keeps
  the order that was asked for;
- any cut on a server that honours seeds. Its sampler draws one random number per token id in a batch
  that has no native cut and one per *rank* in a batch that has any (`simple_sampling_case`,
  layers/sampler.py in 0.5.23), so with native cuts a row would depend on its neighbours' settings;
  and native min_p with a seed kills the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.core.config import Generation
from tasks.core.heuristics import Heuristic
from tasks.serving.logit_processor import encode_steps, processor_string


@dataclass(frozen=True)
class Compiled:
    """A heuristic as one server executes it."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    custom_params: dict[str, Any] | None = None

    @property
    def dialect(self) -> str:
        """How several cuts would combine on this path."""
        return "sequential" if self.custom_params is not None else "joint"

    def sampling_params(self, generation: Generation, seed: int) -> dict[str, Any]:
        """Every sampling field of one request, so that no server default can slip under it."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
            "max_new_tokens": generation.max_new_tokens, "min_new_tokens": generation.min_new_tokens,
            "stop": list(generation.stop), "stop_token_ids": [], "ignore_eos": False, "n": 1,
            "skip_special_tokens": True, "spaces_between_special_tokens": True, "no_stop_trim": False,
            "sampling_seed": seed,
        } | ({"custom_params": self.custom_params} if self.custom_params is not None else {})

    @property
    def processor(self) -> str | None:
        """The custom processor's string, where there is one to send."""
        return processor_string() if self.custom_params is not None else None


def compile_heuristic(heuristic: Heuristic, honours_seeds: bool) -> Compiled:
    """What to send for `heuristic`; `honours_seeds`: the server runs in deterministic mode."""
    native = _native(heuristic)
    cuts = native is not None and (native.top_k, native.top_p, native.min_p) != (-1, 1.0, 0.0)
    if native is None or (cuts and honours_seeds):
        return Compiled(custom_params=encode_steps(heuristic.steps))
    return native


def _native(heuristic: Heuristic) -> Compiled | None:
    """Native parameters that equal the heuristic, or None where there are none."""
    names = [p.name for p in heuristic.processors]
    cuts = [p for p in heuristic.processors if p.name != "temperature"]
    if names.count("temperature") > 1 or len(cuts) > 1:
        return None
    if any(p.name not in ("top_k", "top_p", "min_p") or p.min_tokens_to_keep > 1 for p in cuts):
        return None
    # the engine's temperature comes first; only top_k does not mind which side it is on
    if "temperature" in names[1:] and cuts[0].name != "top_k":
        return None
    values: dict[str, Any] = {p.name: p.value for p in heuristic.processors}
    return Compiled(**values)
