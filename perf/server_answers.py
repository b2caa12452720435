"""Wall time of answers from a server of fixed latency, against latency x answers / concurrency.

    python perf/server_answers.py [--answers 1000] [--latency 4] [--concurrency 40]

The server is a process of its own that answers nothing in earnest: it waits `latency` seconds for
each request, however many there are, and returns 128 token ids. What is measured is what the client
adds: requests, replies read and split, the cache on disk. Best of `--rounds`, each with a new
cache; the last figure of a round is the same call with every reply in the cache. A busy machine
wakes the server late: the latency of the bound is what the server measured, from a request that is
read to its reply that is written; the ratio to the nominal latency stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path

from abliterator.engines import CompletionClient, Engine, ServedByName, ServedEngine
from abliterator.model import load_tokenizer
from abliterator.recipe import load_engine
from abliterator.source import resolve_folder

TOKENS = 128


def serve(latency: float, port: Connection) -> None:
    """Answers HTTP on a free port of 127.0.0.1, sent through `port`, until it is ended."""
    served = []  # seconds of each completion

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            lines = head.decode("latin-1").lower().split("\r\n")
            lengths = [int(line[15:]) for line in lines if line.startswith("content-length:")]
            body = await reader.readexactly(lengths[0]) if lengths else b"{}"
            reply, status = {}, "404 Not Found"
            if lines[0].startswith("get /v1/models"):
                reply, status = {"data": [{"id": "base"}]}, "200 OK"
            elif lines[0].startswith("post /v1/completions"):
                begin = time.perf_counter()
                await asyncio.sleep(latency)
                reply, status = completion(json.loads(body)), "200 OK"
            elif lines[0].startswith("get /served"):
                reply, status = {"seconds": sum(served) / len(served)}, "200 OK"
                served.clear()
            data = json.dumps(reply).encode()
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            await writer.drain()
            if lines[0].startswith("post /v1/completions"):
                served.append(time.perf_counter() - begin)

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def completion(asked: dict[str, object]) -> dict[str, object]:
    """A reply whose tokens depend on the prompt."""
    prompt = asked["prompt"]
    assert isinstance(prompt, list)
    n = asked["max_tokens"]
    assert isinstance(n, int)
    tokens = [prompt[i % len(prompt)] for i in range(n)]
    choice = {"index": 0, "text": "", "finish_reason": "length", "token_ids": tokens}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": n}
    return {"model": "base", "choices": [choice], "usage": usage}


def latency_of(address: str) -> float:
    """Mean seconds of the completions since the last call, as the server measured them."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{address}/served") as reply:
        return float(json.load(reply)["seconds"])


def no_passes() -> Engine:
    """Fails: answers need no pass."""
    raise AssertionError("answers of a server need no weights")


def main() -> None:
    """Prints the ratio of every round, and the best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--latency", type=float, default=4.0)
    parser.add_argument("--concurrency", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(arguments.latency, there), daemon=True
    )
    server.start()
    address = f"http://127.0.0.1:{here.recv()}"
    section = load_engine(
        [
            "engine.kind=server",
            f"engine.base_url={address}/v1",
            f"engine.concurrency={arguments.concurrency}",
        ]
    )
    folder = resolve_folder("embedded:demo", revision=None).folder
    tokenizer = load_tokenizer(folder)
    prompts = [[4 + n % 50, 4 + n // 50, *range(4, 36)] for n in range(arguments.answers)]
    calls = arguments.answers / arguments.concurrency  # of one worker
    ratios = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch) / "answers.sqlite"
            client = CompletionClient(section.server("base", model="base"), tokenizer, cache=cache)
            engine = ServedEngine(
                folder, tokenizer, ServedByName(client, "base", "stub"), passes=no_passes
            )
            engine.probed(prompts[0], max_new_tokens=TOKENS)
            latency_of(address)
            seconds, spent, latency = [], [], 0.0
            for _ in range(2):
                begin, cpu = time.perf_counter(), time.process_time()
                answers = engine.answers(prompts, max_new_tokens=TOKENS, batch_size=1)
                seconds.append(time.perf_counter() - begin)
                spent.append(1000 * (time.process_time() - cpu) / arguments.answers)
                assert len(answers) == arguments.answers
                latency = latency or latency_of(address)
        bound = calls * latency
        ratios.append(seconds[0] / bound)
        print(
            f"round {number + 1}: {seconds[0]:.2f} s, bound {bound:.2f} s, ratio {ratios[-1]:.3f} "
            f"({seconds[0] / calls / arguments.latency:.3f} to the nominal latency), "
            f"{spent[0]:.2f} ms of CPU an answer; from the cache {spent[1]:.2f} ms"
        )
    print(f"best ratio {min(ratios):.3f}, to be at most 1.05")
    server.terminate()


if __name__ == "__main__":
    main()
