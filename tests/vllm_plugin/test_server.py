"""A real `vllm serve` on loopback, used through the OpenAI API: many requests at once, chunks, prefix caching."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI

from serving_helpers import (
    Case,
    Server,
    byte_tokenizer,
    mixed_prompts,
    random_prompt,
    save_checkpoint,
    server,
    sure_cases,
)

STEPS = 24
SMALL = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "16"]
CHUNKED = ["--max-num-batched-tokens", "64", "--block-size", "32", "--dtype", "float32"]

SETTINGS = {
    "slot-k1": {"active_query_experts": 1},
    "slot-k2": {"active_query_experts": 2},
    "expert-k1": {"active_query_experts": 1, "output_projection": "expert"},
    "expert-k2": {"active_query_experts": 2, "output_projection": "expert"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def served(request, tmp_path_factory) -> tuple[Server, list[Case]]:
    """A server for each setting; the first is compiled as by default, the others start faster without compilation."""
    folder = tmp_path_factory.mktemp(request.param)
    cases = sure_cases(save_checkpoint(folder, **SETTINGS[request.param]), mixed_prompts(), STEPS)
    eager = [] if request.param == "slot-k1" else ["--enforce-eager"]
    with server(folder, *SMALL, *CHUNKED, *eager) as running:
        yield running, cases


async def complete_all(url: str, prompts: list[list[int]]) -> list[list[int]]:
    """Send all prompts at once. -> the generated tokens of each."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        replies = await asyncio.gather(
            *(
                client.completions.create(
                    model="gqe", prompt=prompt, max_tokens=STEPS, temperature=0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                for prompt in prompts
            )
        )  # fmt: skip
    return [reply.choices[0].model_extra["token_ids"] for reply in replies]


def test_greedy_answers_to_many_requests_at_once_are_transformers_tokens(served):
    running, cases = served
    for round_ in ("cold", "with the prompts' blocks cached"):
        answers = asyncio.run(complete_all(running.url, [case.prompt for case in cases]))
        wrong = [len(c.prompt) for c, a in zip(cases, answers, strict=True) if a != c.continuation]
        assert not wrong, f"{round_}: prompts of {wrong} tokens"
    assert running.metric("vllm:prefix_cache_hits_total") > 1000, "no prefix was ever found in the cache"


def test_a_chat_and_its_stream_are_the_completion_of_its_template(served):
    running, _ = served
    client = OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=300)
    options = {"model": "gqe", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    messages = [{"role": "user", "content": "Which experts are active?"}]
    text = byte_tokenizer().apply_chat_template(messages, tokenize=False)
    completed = client.completions.create(prompt=text, **options).choices[0].text
    assert completed
    assert client.chat.completions.create(messages=messages, **options).choices[0].message.content == completed
    pieces = client.chat.completions.create(messages=messages, stream=True, **options)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == completed


def test_tokens_that_ngrams_drafted_are_transformers_tokens(tmp_path: Path):
    prompts = [random_prompt(n, n) * 3 for n in (2, 5, 20, 60)] + mixed_prompts()
    cases = sure_cases(save_checkpoint(tmp_path, active_query_experts=2), prompts, STEPS)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with server(
        tmp_path, *SMALL, *CHUNKED, "--enforce-eager", "--speculative-config", json.dumps(drafts)
    ) as running:  # fmt: skip
        answers = asyncio.run(complete_all(running.url, [case.prompt for case in cases]))
        accepted = running.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert answers == [case.continuation for case in cases]
    assert accepted > 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize(
    "setting",
    [
        {"active_query_experts": 1, "attention_bias": True, "num_key_value_heads": 4},  # two groups a rank
        {"active_query_experts": 2, "output_projection": "expert", "shared_head_kv": "first"},
    ],
    ids=["slot-mean", "expert-first"],
)
def test_two_tensor_parallel_ranks_give_transformers_tokens(setting, tmp_path: Path):
    cases = sure_cases(save_checkpoint(tmp_path, **setting), mixed_prompts(), STEPS)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    with server(
        tmp_path, *SMALL, *CHUNKED, "--enforce-eager", "--tensor-parallel-size", "2",
        VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}",
    ) as running:  # fmt: skip
        answers = asyncio.run(complete_all(running.url, [case.prompt for case in cases]))
    assert answers == [case.continuation for case in cases]
