"""How a judge is asked: questions in batches, each once, and what a failing batch comes to.

SGLang takes a list of token ids in one request, which spares most of a request's cost, but fails such a list as a
whole: one question that it refuses is a refusal of all. So a batch that fails is halved until it is known which
question it is; and one that was in flight when its server died comes apart at once, so that the second crash has one
culprit. A question that fails has no answer but a reason.
"""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.context import Context
from tasks.core.errors import InputError
from tasks.labels.quality.judgements import Keeper
from tasks.serving.client import Reply, ServerFacts, SGLangClient
from tasks.serving.failures import RequestFailed
from tasks.serving.request import Outcome, Request

_YIELD_EVERY = 8  # questions encoded in a row, while nothing else runs on the loop


@dataclass(frozen=True, slots=True)
class Answer:
    """What the judge says of a question, or why it says nothing."""

    value: float | None
    """P(the answer shown first is better), or a reward model's score."""
    outside: float | None
    """Probability of the tokens that are no verdict; 0 where there are none."""
    reason: str | None


class Asker(ABC):
    """Asks the judge servers; the same question once, also across restarts and runs."""

    def __init__(self, ctx: Context, shard: int, *request: Any, batch: int, batch_tokens: int) -> None:
        """`request`: all that shapes an answer but the judge and the texts; `batch`, `batch_tokens`: most questions
        and token ids of one request."""
        self.ctx, self.pool = ctx, ctx.pool("judge")
        self.kept = Keeper(ctx, shard, *request)
        self._batch, self._batch_tokens = batch, batch_tokens
        self._under_way: dict[bytes, asyncio.Future[Answer]] = {}
        self._encoding = asyncio.Lock()  # a group's questions, then another's: the first can be sent while others wait

    @abstractmethod
    def encode(self, texts: Sequence[Any]) -> tuple[bytes, int]:
        """The JSON list of a question's token ids, and how many they are. Raises ValueError, InputError."""

    @abstractmethod
    def body(self, ids: bytes, rids: bytes) -> bytes:
        """The request for a JSON list of lists of token ids, and the JSON list of their ids."""

    @abstractmethod
    async def send(self, client: SGLangClient, body: bytes, timeout_s: float, rids: Sequence[str]) -> Reply:
        """Send it. Raises RequestFailed."""

    @abstractmethod
    def read(self, said: Any) -> Answer:
        """The answer in what a server says of one question (an element of `Reply.scores`)."""

    async def ask(self, questions: Sequence[tuple[tuple[str, ...], Sequence[Any]]]) -> list[Answer]:
        """The answers in order. A question: the texts that it is known by, and what `encode` makes its ids of.

        Raises UnreachableError, StorageError.
        """
        answers: list[asyncio.Future[Answer]] = []
        wanted: list[_Question] = []
        for names, texts in questions:
            key = self.kept.key(*names)
            answers.append(self._begun(key) or self._begin(key, texts, wanted))
        try:
            await self._send([question async for question in self._encoded(wanted)])
        except BaseException as error:
            for question in wanted:  # another group may wait for it, and ends too
                question.fail(error)
            raise
        finally:
            for question in wanted:
                self._under_way.pop(question.key, None)
        return [await answer for answer in answers]

    def _begun(self, key: bytes) -> asyncio.Future[Answer] | None:
        """The future of an answer that is known, or that another group has just asked for."""
        if (future := self._under_way.get(key)) is not None:
            self.ctx.progress.spare("quality", 1)
            return future
        if (known := self.kept.get(key)) is None:
            return None
        self.ctx.progress.advance("quality", already=True)
        future = asyncio.get_running_loop().create_future()
        future.set_result(Answer(*known, None))
        return future

    def _begin(self, key: bytes, texts: Sequence[Any], wanted: list[_Question]) -> asyncio.Future[Answer]:
        wanted.append(_Question(key, texts, asyncio.get_running_loop().create_future()))
        self._under_way[key] = wanted[-1].future
        return wanted[-1].future

    async def _encoded(self, wanted: list[_Question]) -> AsyncIterator[_Question]:
        """Those of the questions that can be sent, with their ids."""
        async with self._encoding:
            for n, question in enumerate(wanted):
                if n % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                try:
                    question.ids, question.tokens = self.encode(question.texts)
                except (InputError, ValueError) as error:
                    self.settle(question, Answer(None, None, f"not_sent: {error}"), asked=False)
                    continue
                yield question

    async def _send(self, questions: list[_Question]) -> None:
        batches = [_Batch(self, part) for part in self._batches(questions)]
        while batches:
            await self.pool.ask_all((batch.request for batch in batches), len(batches))
            batches = [part for batch in batches for part in batch.parts]

    def _batches(self, questions: Sequence[_Question]) -> Iterator[list[_Question]]:
        # A server with a short queue would turn a longer list away. Where that is not known yet, the list comes apart
        queues = [facts.info.get("max_queued_requests") for _, _, facts in self.ctx.servers_seen("judge")]
        most = max(1, min([self._batch, *(q for q in queues if isinstance(q, int))]))
        batch: list[_Question] = []
        tokens = 0
        for question in questions:
            if batch and (len(batch) == most or tokens + question.tokens > self._batch_tokens):
                yield batch
                batch, tokens = [], 0
            batch.append(question)
            tokens += question.tokens
        if batch:
            yield batch

    def settle(self, question: _Question, answer: Answer, *, asked: bool = True) -> None:
        """A question has its answer, or the reason why it has none. Raises StorageError."""
        if answer.value is not None:
            self.kept.put(question.key, answer.value, answer.outside or 0.0)
        elif asked:
            self.kept.failed()
        self.ctx.progress.advance("quality", abstained=int(answer.value is None))
        if not question.future.done():
            question.future.set_result(answer)


@dataclass(eq=False, slots=True)
class _Question:
    """One question on its way to its answer."""

    key: bytes
    texts: Sequence[Any]
    future: asyncio.Future[Answer]
    ids: bytes = b""
    """JSON."""
    tokens: int = 0

    def fail(self, error: BaseException) -> None:
        if self.future.done():
            return
        if isinstance(error, Exception):
            self.future.set_exception(error)
            self.future.exception()  # seen, also where nobody else waits for it
        else:
            self.future.cancel()


class _Batch:
    """The questions of one request; `parts` are the smaller batches that it fell into."""

    __slots__ = ("_asker", "_rids", "parts", "questions", "request")

    def __init__(self, asker: Asker, questions: list[_Question], crashes: int = 0) -> None:
        self._asker, self.questions = asker, questions
        self._rids: list[str] = []
        self.parts: list[_Batch] = []
        self.request = Request(self._build, self._settle, crashes=crashes, ask=self._ask, divisible=len(questions) > 1)

    def _build(self, facts: ServerFacts) -> bytes:
        """The body. What the server's cache can't hold would, at /classify of SGLang 0.5.23, stand in its queue for
        ever and all others behind it, so that is not sent."""
        most, longest = facts.info.get("max_req_input_len"), max(question.tokens for question in self.questions)
        if isinstance(most, int) and longest >= most:
            raise RequestFailed("rejected", f"{longest} tokens, and the server's cache takes fewer than {most}")
        # new ones each time: what was given up a moment ago may still be known there
        self._rids = [uuid.uuid4().hex for _ in self.questions]
        return self._asker.body(b"[" + b",".join(q.ids for q in self.questions) + b"]", orjson.dumps(self._rids))

    async def _ask(self, client: SGLangClient, body: bytes, timeout_s: float) -> Reply:
        return await self._asker.send(client, body, timeout_s, self._rids)

    def _settle(self, sent: Outcome) -> None:
        failure = sent.failure
        if sent.reply is not None and sent.reply.scores is not None:
            for question, said in zip(self.questions, sent.reply.scores, strict=True):
                self._asker.settle(question, self._asker.read(said))
        elif len(self.questions) == 1 or failure is None:
            reason = f"{failure.kind}: {failure}" if failure else "no reply"
            for question in self.questions:
                self._asker.settle(question, Answer(None, None, reason))
        else:
            self._split(failure)

    def _split(self, failure: RequestFailed) -> None:
        """Into halves; into single questions, each at its first crash, where one of them may have killed a server."""
        deadly = failure.kind in ("crashed", "poison")
        size = 1 if deadly else (len(self.questions) + 1) // 2
        for n in range(0, len(self.questions), size):
            part = _Batch(self._asker, self.questions[n : n + size], crashes=int(deadly))
            part.request.counts_what(self.request, failure)
            self.parts.append(part)
