"""The other clients, each in a process of its own: a bare aiohttp loop, and threads with `requests` (candidates or
judgements).

    .venv/bin/python benchmarks/clients.py '{"how": "bare", "urls": [...], "in_flight": 64, ...}'

Prints one line of JSON with CPU seconds, from before the first request to after the last answer.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Payload = dict[str, Any]


def payloads(known: list[Payload], count: int) -> Iterator[Payload]:
    """So many of the recorded requests, over and over, each with an id of its own."""
    for n in range(count):
        yield known[n % len(known)] | {"rid": f"{n:032x}"}


async def bare(work: list[tuple[str, Iterator[Payload]]], in_flight: int) -> int:
    """Post each server's payloads with `in_flight` workers, parse the answers, do nothing else; answers."""
    import asyncio

    import aiohttp

    answered = 0

    async def worker(session: aiohttp.ClientSession, url: str, queue: Iterator[Payload]) -> None:
        nonlocal answered
        for payload in queue:
            async with session.post(url + "/generate", json=payload) as answer:
                json.loads(await answer.read())
                answered += answer.status == 200

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session, url, queue) for url, queue in work for _ in range(in_flight)))
    return answered


def threads(urls: list[str], queue: Iterator[Payload], in_flight: int, out: Path) -> int:
    """All futures made at the start, servers in turn, a connection a request, JSON lines appended; answers."""
    import requests

    def ask(payload: Payload, url: str) -> dict[str, Any] | None:
        try:
            answer = requests.post(url + "/generate", json=payload, timeout=300)
            answer.raise_for_status()
            return answer.json()
        except requests.RequestException:
            return None  # and the row is lost

    answered = 0
    with out.open("a") as file, ThreadPoolExecutor(max_workers=in_flight) as pool:
        futures = {pool.submit(ask, payload, url): payload for payload, url in zip(queue, itertools.cycle(urls))}
        for future in as_completed(futures):
            if (result := future.result()) is None:
                continue
            answered += 1
            row = {"rid": futures[future]["rid"], "sampling_params": futures[future]["sampling_params"],
                   "text": result["text"], "meta_info": result["meta_info"]}
            file.write(json.dumps(row) + "\n")
    return answered


def judge(job: dict[str, Any]) -> int:
    """Judgements as they come out of the usual script: each prompt rendered and encoded whole, one request each, a
    connection a request, all futures made at the start; answers."""
    import requests

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tasks.core.chat_template import chat_template
    from tasks.core.config import ModelRef
    from tasks.core.tokenizer import load_tokenizer
    from tasks.labels.quality.templates import FEW_SHOT

    tokenizer = load_tokenizer(ModelRef(path=job["model"]))
    chat, texts = chat_template(tokenizer), json.loads(Path(job["payloads"]).read_bytes())
    ids = list(FEW_SHOT.verdict_token_ids(tokenizer, chat))
    job["began"], job["cpu"] = time.monotonic(), time.process_time()

    def ask(n: int) -> bool:
        a, b = texts[n % len(texts)], texts[(7 * n + 1) % len(texts)]
        payload = {"input_ids": FEW_SHOT.render(tokenizer, "Which is better?", a, b, chat=chat), "rid": f"{n:032x}",
                   "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "token_ids_logprob": ids}
        answer = requests.post(job["urls"][0] + "/generate", json=payload, timeout=300)
        return len(answer.json()["meta_info"]["output_token_ids_logprobs"][0]) == 2

    with ThreadPoolExecutor(max_workers=job["in_flight"]) as pool:
        return sum(pool.map(ask, range(job["requests"])))


def main() -> None:
    """Do as the first argument says."""
    job = json.loads(sys.argv[1])
    urls, in_flight = job["urls"], job["in_flight"]
    if job["how"] == "judge":
        answered = judge(job)
        print(json.dumps({"answered": answered, "wall_s": time.monotonic() - job["began"],
                          "cpu_s": time.process_time() - job["cpu"]}))
        return
    queue = payloads([json.loads(line) for line in Path(job["payloads"]).read_bytes().splitlines()], job["requests"])
    began, cpu = time.monotonic(), time.process_time()
    if job["how"] == "threads":
        answered = threads(urls, queue, in_flight, Path(job["out"]))
    else:  # bare; with several servers, each has its share from the start
        import uvloop

        work = [(urls[0], queue)]
        if len(urls) > 1:
            bound = list(queue)
            work = [(url, iter(bound[n::len(urls)])) for n, url in enumerate(urls)]
        answered = uvloop.run(bare(work, in_flight))
    print(json.dumps({"answered": answered, "wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
