"""The judge: one pair, shown in both orders, by the probabilities of the verdict tokens.

A judgement that fails is an abstention with a reason, never an invented 0.5.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tasks.context import Context
from tasks.core.identity import digest
from tasks.labels.quality.templates import JudgeTemplate, outcome
from tasks.serving.compile import Compiled
from tasks.serving.loop import gather_all
from tasks.serving.request import Outcome


@dataclass(frozen=True)
class Verdict:
    """One order of one pair: P(the first shown is better), or why there is none."""

    first: float | None
    outside: float | None
    reason: str | None


def sampling_params(ctx: Context) -> dict[str, Any]:
    """Every sampling field of a judgement: complete, so that nothing of the server's own defaults reaches it."""
    judge = ctx.generation("judge")
    own = Compiled(judge["temperature"], judge["top_k"], judge["top_p"], judge["min_p"])
    return own.sampling_params(judge, judge["seed"])


def template_of(ctx: Context) -> JudgeTemplate:
    """The judge's template: the one that was recorded, with the role's system prompt where it has one."""
    named, system = JudgeTemplate.from_recorded(ctx.judge_template), ctx.config.generation.judge.system_prompt
    return named if system is None else named.with_system(system)


class Judge:
    """Asks the judge servers; each (template, prompt, first, second) once per shard, also across restarts."""

    def __init__(self, ctx: Context, shard: int) -> None:
        self.ctx, self.pool = ctx, ctx.pool("judge")
        quality = ctx.config.quality
        self.template = template_of(ctx)
        self._chat = ctx.chat_template("judge")
        self._limit = quality.max_prompt_tokens
        self._tokens = self.template.verdict_token_ids(ctx.judge_tokenizer, self._chat)
        self._sampling = sampling_params(ctx)
        self._journal = ctx.store.journal(f"quality/shard-{shard:04d}.jsonl")
        self._known = {r["key"]: Verdict(**r["verdict"]) for r in self._journal if r["verdict"]["first"] is not None}

    async def compare(self, prompt: str, a: str, b: str) -> tuple[Verdict, Verdict]:
        """Both orders: (a shown first, b shown first)."""
        first, second = await gather_all([self._ask(prompt, a, b), self._ask(prompt, b, a)])
        return first, second

    async def _ask(self, prompt: str, first: str, second: str) -> Verdict:
        key = digest("judgement", self.ctx.config.judge_model.model_dump(), self.template.digest, self._chat.digest,
                     self._sampling, self._limit, prompt, first, second)
        if (known := self._known.get(key)) is None:
            known = await self._send(prompt, first, second)
            self._journal.append({"key": key, "verdict": asdict(known)})
            if known.first is not None:
                self._known[key] = known
        self.ctx.progress.advance("quality", abstained=known.first is None)
        return known

    async def _send(self, prompt: str, first: str, second: str) -> Verdict:
        ids = self.template.render(self.ctx.judge_tokenizer, prompt, first, second, max_tokens=self._limit,
                                   chat=self._chat)
        sent = await self.pool.ask({
            "input_ids": ids, "sampling_params": self._sampling, "return_logprob": True, "logprob_start_len": -1,
            "top_logprobs_num": 0, "token_ids_logprob": list(self._tokens), "stream": False,
        })
        return self._read(sent)

    def _read(self, sent: Outcome) -> Verdict:
        if sent.failure is not None or sent.reply is None:
            return Verdict(None, None, f"{sent.failure.kind}: {sent.failure}" if sent.failure else "no reply")
        try:
            entries: Any = sent.reply.meta["output_token_ids_logprobs"][0]
            by_id = {entry[1]: entry[0] for entry in entries}
            better, outside = outcome(by_id[self._tokens[0]], by_id[self._tokens[1]])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return Verdict(None, None, f"no_verdict: {error or type(error).__name__}")
        return Verdict(better, outside, None)

    def close(self, *, done: bool) -> None:
        """Close the journal; `done`: the shard's files stand, forget it."""
        if done:
            self._journal.remove()
        else:
            self._journal.close()
