"""`/v1/completions`, answered in one piece."""

from __future__ import annotations

import pytest

PATH = "/v1/completions"


async def test_answer_has_the_shape_of_openai(client, engine):
    answer = (await client.post(PATH, json={"model": "tiny", "prompt": "ab"})).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert engine.calls[0].prompt == [256, 97, 98]
    assert engine.calls[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 97, 98]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
async def test_prompts_come_in_four_forms(client, engine, prompt, expected):
    answer = (await client.post(PATH, json={"prompt": prompt})).json()
    assert [call.prompt for call in engine.calls] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * len(expected)


async def test_choices_of_several_prompts_are_numbered_through(client, engine):
    answer = (await client.post(PATH, json={"prompt": ["a", "b"], "n": 2})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({call.request_id for call in engine.calls}) == 2


@pytest.mark.parametrize("prompt", [[], "missing", None, 5, [[]], ["a", 1], [1, "a"], [1.5], [True], {"a": 1}, [["a"]]])
async def test_other_forms_of_prompt_are_refused(client, engine, prompt):
    body = {} if prompt == "missing" else {"prompt": prompt}
    response = await client.post(PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert engine.calls == []


async def test_a_million_prompts_are_refused(client, engine):
    response = await client.post(PATH, json={"prompt": ["a"] * 1_000_000})
    assert response.status_code == 400
    assert "1000000 prompts" in response.json()["error"]["message"]
    assert engine.calls == []


@pytest.mark.parametrize("token", [-1, 300, 2**63])
async def test_token_ids_outside_the_output_width_are_refused(client, engine, token):
    response = await client.post(PATH, json={"prompt": [1, token]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert engine.calls == []


async def test_special_tokens_can_be_left_out(client, engine):
    await client.post(PATH, json={"prompt": "ab", "add_special_tokens": False})
    assert engine.calls[0].prompt == [97, 98]


async def test_default_max_tokens_is_clamped_to_the_context(client, engine):
    assert (await client.post(PATH, json={"prompt": [1] * 250})).status_code == 200
    assert engine.calls[0].params.max_tokens == 6


async def test_explicit_max_tokens_is_not_clamped(client):
    response = await client.post(PATH, json={"prompt": [1] * 250, "max_tokens": 7})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")


async def test_echo_repeats_the_prompt(client):
    answer = (await client.post(PATH, json={"prompt": ["ab", "cd"], "echo": True})).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abHello!", "cdHello!"]
    answer = (await client.post(PATH, json={"prompt": [104, 105], "echo": True})).json()
    assert answer["choices"][0]["text"] == "hiHello!"


async def test_echo_repeats_what_is_left_of_a_prompt_that_was_cut(client):
    answer = (await client.post(PATH, json={"prompt": "abcdef", "echo": True, "truncate_prompt_tokens": 2})).json()
    assert answer["choices"][0]["text"] == "efHello!"


async def test_echo_with_logprobs_is_refused_by_name(client):
    response = await client.post(PATH, json={"prompt": "a", "echo": True, "logprobs": 1})
    assert response.json()["error"]["param"] == "echo"
    assert response.json()["error"]["code"] == "unsupported_parameter"


async def test_logprobs_are_four_parallel_lists(client):
    logprobs = (await client.post(PATH, json={"prompt": "a", "logprobs": 2})).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("Hello!")
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert logprobs["token_logprobs"] == [-0.5] * 5 + [-9999.0]
    assert logprobs["top_logprobs"][0] == {"A": -65.0, "B": -66.0, "H": -0.5}


async def test_an_error_in_one_prompt_ends_the_others(client, engine):
    engine.hold, engine.error_at = 1, 0
    generate = engine.generate

    async def fails_for_b(prompt, params, **kwargs):
        if prompt[-1] == ord("b"):
            raise RuntimeError("secret path /srv/x")
        async for delta in generate(prompt, params, **kwargs):
            yield delta

    engine.generate = fails_for_b
    response = await client.post(PATH, json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 500
    assert "/srv" not in response.text
    assert engine.num_open_requests == 0
    assert len(engine.aborted) == len(engine.calls)
