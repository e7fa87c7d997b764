"""The pairwise judge: one pair, shown in both orders, by the probabilities of the verdict tokens.

A judgement that fails is an abstention with a reason, never an invented 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from tasks.context import Context
from tasks.labels.quality.asking import Answer, Asker
from tasks.labels.quality.rendering import prompt_encoder
from tasks.labels.quality.templates import JudgeTemplate, outcome
from tasks.serving.client import Reply, SGLangClient
from tasks.serving.compile import Compiled

BATCH, BATCH_TOKENS = 8, 16_384
"""Most judgements and tokens in one request."""


def sampling_params(ctx: Context) -> dict[str, Any]:
    """Every sampling field of a judgement: complete, so that nothing of the server's own defaults reaches it."""
    judge = ctx.generation("judge")
    own = Compiled(judge["temperature"], judge["top_k"], judge["top_p"], judge["min_p"])
    return own.sampling_params(judge, judge["seed"])


def template_of(ctx: Context) -> JudgeTemplate:
    """The judge's template: the one that was recorded, with the role's system prompt where it has one."""
    return JudgeTemplate.from_recorded(ctx.judge_template).with_system(ctx.config.generation.judge.system_prompt)


class Judge(Asker):
    """Asks which of two answers is better: `Answer.value` is P(the one shown first)."""

    def __init__(self, ctx: Context, shard: int) -> None:
        self.template = template_of(ctx)
        chat, limit, sampling = ctx.chat_template("judge"), ctx.config.quality.max_prompt_tokens, sampling_params(ctx)
        super().__init__(ctx, shard, "pairwise", self.template.digest, chat.digest, sampling, limit, batch=BATCH,
                         batch_tokens=BATCH_TOKENS)
        self._verdicts = self.template.verdict_token_ids(ctx.judge_tokenizer, chat)
        self._encoder = prompt_encoder(self.template, ctx.judge_tokenizer, chat, limit)
        # the body of every request but for its ids
        self._rest = b"," + orjson.dumps({
            "sampling_params": sampling, "return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0,
            "token_ids_logprob": list(self._verdicts), "stream": False})[1:]

    async def compare(self, prompt: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[Answer, Answer]]:
        """Both orders of each pair: (the first text shown first, the second shown first).

        Raises UnreachableError, StorageError.
        """
        shown = [(prompt, *order) for a, b in pairs for order in ((a, b), (b, a))]
        made = await self.ask([(texts, texts) for texts in shown])
        return list(zip(made[::2], made[1::2], strict=True))

    def encode(self, texts: Sequence[Any]) -> tuple[bytes, int]:
        """See `Asker`."""
        return self._encoder.ids(*texts)

    def body(self, ids: bytes, rids: bytes) -> bytes:
        """See `Asker`."""
        return b'{"input_ids":' + ids + b',"rid":' + rids + self._rest

    async def send(self, client: SGLangClient, body: bytes, timeout_s: float, rids: Sequence[str]) -> Reply:
        """See `Asker`."""
        return await client.generate_each(body, timeout_s, rids=rids)

    def read(self, said: Any) -> Answer:
        """See `Asker`."""
        try:
            entries: Any = said["output_token_ids_logprobs"][0]
            by_id = {entry[1]: entry[0] for entry in entries}
            found = by_id[self._verdicts[0]], by_id[self._verdicts[1]]
        except (KeyError, IndexError, TypeError):
            return Answer(None, None, "no_verdict: the answer has no log-probabilities of the verdict tokens")
        try:
            better, outside = outcome(*found)
        except (TypeError, ValueError) as error:
            return Answer(None, None, f"no_verdict: {error}")
        return Answer(better, outside, None)
