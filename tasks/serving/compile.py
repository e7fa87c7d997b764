"""From a heuristic to what an SGLang server executes: native parameters or the custom processor.

Native where the engine's result is the heuristic's, whatever else is in its batch:

- temperature alone (0, which takes the likeliest token, is to the engine a cut as well);
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

Where the config wants it (`generation.generator.sampling_mask`), a request with a native top_k also asks for the
engine's record of what it kept (`sampling_mask`); `largest_mask` says where that can be had.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.core.generation import RoleGeneration
from tasks.core.heuristics import Heuristic
from tasks.serving.client import ServerFacts
from tasks.serving.logit_processor import encode_steps, processor_string
from tasks.serving.sampling_mask import GREEDY_TOP_K, LARGEST_TOP_K, SMALLEST_TOP_K


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

    def sampling_params(self, generation: RoleGeneration, seed: int) -> dict[str, Any]:
        """Every sampling field of one request, so that no server default can slip under it."""
        return {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
        } | asked(generation, seed) | ({"custom_params": self.custom_params} if self.custom_params is not None else {})

    @property
    def processor(self) -> str | None:
        """The custom processor's string, where there is one to send."""
        return processor_string() if self.custom_params is not None else None

    def masked(self, largest: int) -> bool:
        """Whether a server whose `largest_mask` that is records what it kept of such a request."""
        greedy = self.temperature == 0 or self.top_k == GREEDY_TOP_K
        bounded = greedy or SMALLEST_TOP_K <= self.top_k <= largest
        return largest > 0 and self.custom_params is None and bounded


_BY_ROLE = ("frequency_penalty", "presence_penalty", "repetition_penalty", "max_new_tokens", "min_new_tokens", "stop",
            "stop_token_ids", "ignore_eos")
_FIXED = {"n": 1, "skip_special_tokens": True, "spaces_between_special_tokens": True, "no_stop_trim": False}
SENT = frozenset({"temperature", "top_k", "top_p", "min_p", "sampling_seed", *_BY_ROLE, *_FIXED})
"""The sampling fields of every request: a server's preferences for these can't reach one."""


def asked(generation: RoleGeneration, seed: int) -> dict[str, Any]:
    """Every sampling field of a request but temperature and native cuts."""
    return {name: generation[name] for name in _BY_ROLE} | _FIXED | {"sampling_seed": seed}


def compile_heuristic(heuristic: Heuristic, honours_seeds: bool) -> Compiled:
    """What to send for `heuristic`; `honours_seeds`: the server runs in deterministic mode."""
    native = _native(heuristic)
    cuts = native is not None and (native.temperature == 0
                                   or (native.top_k, native.top_p, native.min_p) != (-1, 1.0, 0.0))
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


class Template:
    """A heuristic compiled for one kind of server, as text: a request differs by prompt, id and seed alone."""

    def __init__(self, compiled: Compiled, generation: RoleGeneration, masked: bool = False) -> None:
        """`masked`: ask for the engine's sampling mask as well."""
        self.compiled, self.masked = compiled, masked
        marker = 3141592653589793238
        params = json.dumps(compiled.sampling_params(generation, marker), sort_keys=True)
        self._head, self._tail = params.split(str(marker))
        rest: dict[str, Any] = {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0, "stream": False}
        if compiled.processor:
            rest["custom_logit_processor"] = compiled.processor
        if masked:
            rest["return_sampling_mask"] = True
        self._rest = "," + json.dumps(rest)[1:]

    def sampling_params(self, seed: int) -> str:
        """The sampling parameters as JSON, exactly as they are sent."""
        return f"{self._head}{seed}{self._tail}"

    def body(self, prompt_ids: str, rid: str, seed: int) -> bytes:
        """The request: ids in (`prompt_ids`, a JSON list), every sampling field explicit, a seed of its own."""
        return (f'{{"input_ids":{prompt_ids},"rid":"{rid}","sampling_params":{self._head}{seed}{self._tail}'
                f"{self._rest}").encode()


def largest_mask(facts: ServerFacts) -> int:
    """The largest native top_k of which the server hands out its sampling mask; 0: it records none.

    A server that does not name a limit knows no masks. Speculation and the ascend sampler refuse some or all of them.
    flashinfer keeps what ties with the last of the k, and a set larger than the limit ends the request: half of the
    limit is left for that.
    """
    limit, backend = facts.info.get("sampling_mask_max_tokens"), facts.info.get("sampling_backend")
    if not isinstance(limit, int) or facts.speculation or backend == "ascend":
        return 0
    return min(LARGEST_TOP_K, limit if backend == "pytorch" else limit // 2)


def recording(servers: Iterable[ServerFacts], heuristics: Iterable[Heuristic]) -> str:
    """For the log: which heuristics' sampling masks these servers record, and why not those of the others."""
    heuristics = list(heuristics)
    named: set[str] = set()
    able = total = 0
    for facts in servers:
        found = {h.name for h in heuristics if compile_heuristic(h, facts.honours_seeds).masked(largest_mask(facts))}
        named |= found
        able, total = able + bool(found), total + 1
    why = ("only a native top_k has one: a single top_k beside a temperature, on a server without deterministic "
           "inference and without speculation")
    if not named:
        return f"generation.generator.sampling_mask: no mask will be recorded; {why}"
    return (f"generation.generator.sampling_mask: recorded for {_some(sorted(named))} of {len(heuristics)}, on {able} "
            f"of {total} servers; {why}")


def unfit(facts: ServerFacts, heuristics: Iterable[Heuristic]) -> str | None:
    """Why the server can't sample these heuristics as they are, or None.

    What would be sampled another way without a word, or would kill the server, never leaves the client.
    """
    heuristics = list(heuristics)
    compiled = [(h, compile_heuristic(h, facts.honours_seeds)) for h in heuristics]
    processed = [h.name for h, c in compiled if c.custom_params is not None]
    if processed and not facts.custom_processors:
        return (f"it runs without custom logit processors, which {_some(processed)} need; start it with "
                "--enable-custom-logit-processor (only on an address you trust), or choose other heuristics")
    if facts.speculation and (ignored := ignored_by_speculation(heuristics, facts.honours_seeds)):
        return (f"it decodes speculatively ({facts.speculation}), which silently ignores custom logit processors and "
                f"min_p, and {ignored} need them; start it without speculation, or choose other heuristics")
    return None


def ignored_by_speculation(heuristics: Iterable[Heuristic], honours_seeds: bool) -> str | None:
    """The heuristics that speculative decoding would not sample as they are, in words, or None."""
    compiled = [(h, compile_heuristic(h, honours_seeds)) for h in heuristics]
    ignored = [h.name for h, c in compiled if c.custom_params is not None or c.min_p > 0]
    return _some(ignored) if ignored else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} heuristic{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"
