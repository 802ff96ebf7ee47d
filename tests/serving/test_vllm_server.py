"""vLLM's server with a merged model, as clients see it: one process, then killed and started again as two."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import OpenAI
from served_models import LOG_PROBABILITY_BOUND, Served

START_SECONDS = 1800
"""However long other work on the machine makes it; a server that failed is noticed at once."""


@contextlib.contextmanager
def server(folder: str, *options: str):
    """A server's process and a client of it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--served-model-name", "merged", "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--trust-request-chat-template"]  # the tiny tokenizer has none
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen([*command, *options], env=environment, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, "the server stopped"
            assert time.monotonic() < end, "the server does not start"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(1)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
        yield process, client
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(client: OpenAI, prompt: list[int]):
    return client.completions.create(
        model="merged", prompt=prompt, max_tokens=12, temperature=0, logprobs=1, extra_body={"return_token_ids": True}
    ).choices[0]


def assert_answers(model: Served, prompt: list[int], choice) -> None:
    ids = [*prompt, *choice.token_ids]
    expected, limit = model.log_probabilities(ids)
    assert limit == len(ids)
    expected = expected[len(prompt) - 1 : -1]
    assert choice.token_ids == expected.argmax(-1).tolist()
    torch.testing.assert_close(
        torch.tensor(choice.logprobs.token_logprobs), expected.max(-1).values, rtol=0, atol=LOG_PROBABILITY_BOUND
    )


def test_clients_a_killed_server_and_two_processes(served):
    model = served["one key head"]
    prompts = model.draw(5, 60, 200, 400, new_tokens=12)
    with server(model.folder, "--max-model-len", "1024") as (process, client):
        with ThreadPoolExecutor(4) as pool:
            choices = list(pool.map(lambda prompt: ask(client, prompt), prompts))
        for prompt, choice in zip(prompts, choices, strict=True):
            assert_answers(model, prompt, choice)

        stream = client.completions.create(
            model="merged", prompt=prompts[1], max_tokens=12, temperature=0, logprobs=1, stream=True
        )
        pieces = [chunk.choices[0] for chunk in stream if chunk.choices]
        assert len([piece for piece in pieces if piece.text]) > 6
        assert "".join(piece.text for piece in pieces) == choices[1].text
        probabilities = [p for piece in pieces if piece.logprobs for p in piece.logprobs.token_logprobs]
        assert probabilities == pytest.approx(choices[1].logprobs.token_logprobs, abs=LOG_PROBABILITY_BOUND)

        chat = client.chat.completions.create(
            model="merged",
            messages=[{"role": "user", "content": "w5 w6"}],
            max_tokens=4,
            logprobs=True,
            extra_body={"chat_template": "{{ messages[0]['content'] }}", "add_generation_prompt": False},
        )
        assert len(chat.choices[0].logprobs.content) == 4
        assert all(math.isfinite(token.logprob) for token in chat.choices[0].logprobs.content)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    with server(model.folder, "--max-model-len", "1024", "--tensor-parallel-size", "2") as (_, client):
        for prompt, before in zip(prompts, choices, strict=True):
            choice = ask(client, prompt)
            assert choice.token_ids == before.token_ids
            assert_answers(model, prompt, choice)
