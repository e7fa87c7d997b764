"""Pointwise reward models: a scalar for each (prompt, answer), read off a head on the last token.

SGLang serves them (`...ForSequenceClassification` and `...ForRewardModel` with one label) at /classify, which takes a
list of token ids and answers with the head's numbers as they are, no softmax over them. It fails such a list as a
whole (a score that is NaN is a 500 for all of it); `asking` finds out which text it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.context import Context
from tasks.core.chat_template import Chat, ChatTemplate, apply
from tasks.core.config import ModelRef
from tasks.core.tokenizer import vocabulary_size
from tasks.labels.quality.asking import Answer, Asker
from tasks.labels.quality.templates import encode, fitted
from tasks.serving.client import Reply, SGLangClient

BATCH, BATCH_TOKENS = 16, 8192
"""Most texts and tokens in one request. The server batches by itself; larger ones would only make its answers come in
leaps."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A text's score as the server gives it, or why there is none."""

    score: float | None
    reason: str | None


def no_reward_model(model: ModelRef) -> str | None:
    """Why a model gives no single score a text, as far as its config.json tells; None where it may."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except Exception:  # none here, or of a kind that this version does not know: its server will tell
        return None
    names = config.architectures or []
    if names and all(name.endswith("ForCausalLM") for name in names):
        return f"it is a {names[0]}"
    if any(name.endswith("ForSequenceClassification") for name in names) and config.num_labels != 1:
        return f"it gives {config.num_labels} numbers a text (num_labels in its config.json)"
    return None


def conversation(messages: Sequence[dict[str, Any]], answer: str) -> Chat:
    """What the reward model reads: the prompt's turns, then the answer as the assistant's.

    The prompt's system turn is left out, as it is for a judge: reward models are trained on the exchange alone, some of
    their templates refuse such a turn, and it is the same for all answers to a prompt.
    """
    turns = [{"role": m["role"], "content": m["content"]} for m in messages if m["role"] != "system"]
    return [*turns, {"role": "assistant", "content": answer}]


def render(tokenizer: Any, chat: ChatTemplate | None, turns: Chat, max_tokens: int | None, system: str | None = None
           ) -> list[int]:
    """Token ids of a conversation that ends with its answer: the chat template applied once, nothing put around it.

    The texts are defused and cut as those of a pairwise judgement (`JudgeTemplate.render`); each turn, and the answer,
    keeps as many tokens at most. `system`, the judge's own turn (generation.judge.system_prompt), stays as it is.
    Raises InputError where the template refuses the turns, ValueError where it leaves no room for them.
    """
    def rendered(contents: Sequence[str]) -> list[int]:
        filled = [{"role": turn["role"], "content": text} for turn, text in zip(turns, contents, strict=True)]
        own = [] if system is None else [{"role": "system", "content": system}]
        return encode(tokenizer, apply(tokenizer, [[*own, *filled]], chat, answered=True)[0])

    return fitted(tokenizer, [turn["content"] for turn in turns], max_tokens, rendered, "the chat template")


class RewardModel(Asker):
    """Asks for scores: `Answer.value` is the score."""

    def __init__(self, ctx: Context, shard: int) -> None:
        super().__init__(ctx, shard, *self.settings(ctx), batch=BATCH, batch_tokens=BATCH_TOKENS)
        self._tokenizer, self._chat = ctx.judge_tokenizer, ctx.chat_template("judge")
        self._system, self._limit = ctx.config.generation.judge.system_prompt, ctx.config.quality.max_prompt_tokens
        self._vocabulary = vocabulary_size(ctx.config.judge_model, self._tokenizer)

    @staticmethod
    def settings(ctx: Context) -> list[Any]:
        """All that shapes a score but the model and the texts."""
        return ["pointwise", ctx.chat_template("judge").digest, ctx.config.generation.judge.system_prompt,
                ctx.config.quality.max_prompt_tokens]

    @staticmethod
    def signature(ctx: Context) -> str:
        """Model, what it reads, and how: for the dataset's schema."""
        system = ctx.config.generation.judge.system_prompt
        return (f"reward_model:{ctx.config.judge_model.pinned}|sglang:/classify|raw|"
                f"chat:{ctx.chat_template('judge').digest}|turns:{'' if system is None else 'system+'}exchange+answer|"
                f"max_prompt_tokens:{ctx.config.quality.max_prompt_tokens}")

    async def score(self, messages: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[Scored]:
        """The scores of answers to a prompt, in order; equal texts are asked for once.

        Raises UnreachableError, StorageError.
        """
        asked = []
        for text in dict.fromkeys(texts):
            turns = conversation(messages, text)
            asked.append((tuple(part for turn in turns for part in (turn["role"], turn["content"])), turns))
        answers = dict(zip(dict.fromkeys(texts), await self.ask(asked), strict=True))
        return [Scored(answers[text].value, answers[text].reason) for text in texts]

    def encode(self, texts: Chat) -> tuple[bytes, int]:
        """See `Asker`."""
        ids = render(self._tokenizer, self._chat, texts, self._limit, self._system)
        if not ids:
            raise ValueError("the chat template makes nothing of it")
        if (largest := max(ids)) >= self._vocabulary:
            raise ValueError(f"token id {largest} is outside the model's vocabulary of {self._vocabulary}")
        return orjson.dumps(ids), len(ids)

    def body(self, ids: bytes, rids: bytes) -> bytes:
        """See `Asker`."""
        return b'{"input_ids":' + ids + b',"rid":' + rids + b"}"

    async def send(self, client: SGLangClient, body: bytes, timeout_s: float, rids: Sequence[str]) -> Reply:
        """See `Asker`."""
        return await client.classify(body, timeout_s, rids=rids)

    def read(self, said: Any) -> Answer:
        """See `Asker`."""
        return read(said)


def read(numbers: Any) -> Answer:
    """The score in what a server says of a text: the one number of a reward model's head."""
    if not isinstance(numbers, list) or not numbers:
        return Answer(None, None, f"bad_response: the server gives no numbers, but {str(numbers)[:60]}")
    if len(numbers) != 1:
        return Answer(None, None, f"several_labels: the model gives {len(numbers)} numbers a text, a reward model "
                                  "gives one")
    if type(numbers[0]) not in (int, float) or not math.isfinite(numbers[0]):
        return Answer(None, None, f"not_finite: the score is {str(numbers[0])[:60]}")
    return Answer(float(numbers[0]), None, None)
