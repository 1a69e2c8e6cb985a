"""Everything that does not generate: models, tokens, health, load, metrics, CORS, request ids."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aios_serve.async_engine import EngineState
from aios_serve.config import EngineConfig
from aios_serve.outputs import RequestTiming

HELLO = [{"role": "user", "content": "Hi"}]


async def test_models_lists_every_name(client):
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["org/tiny", "tiny"]
    assert models["data"][0]["max_model_len"] == 256
    assert models["data"][0]["object"] == "model"


@pytest.mark.parametrize("path", ["/v1/models/org/tiny", "/v1/models/org%2Ftiny"])
async def test_a_model_whose_name_has_a_slash_can_be_retrieved(client, path):
    assert (await client.get(path)).json()["id"] == "org/tiny"


@pytest.mark.parametrize("path", ["/v1/models/nothing", "/v1/models/"])
async def test_an_unknown_model_is_404(client, path):
    response = await client.get(path)
    assert response.status_code == 404
    assert "org/tiny" in response.json()["error"]["message"]


async def test_tokenize_text(client):
    answer = (await client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
    assert answer == {"count": 3, "max_model_len": 256, "tokens": [256, 97, 98], "token_strs": ["", "a", "b"]}
    answer = (await client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False})).json()
    assert answer["tokens"] == [97, 98]


async def test_tokenize_sees_what_chat_sees(client, engine):
    tokens = (await client.post("/tokenize", json={"messages": HELLO})).json()["tokens"]
    await client.post("/v1/chat/completions", json={"messages": HELLO})
    assert tokens == engine.calls[0].prompt


async def test_tokenize_needs_something_to_tokenize(client):
    assert (await client.post("/tokenize", json={})).status_code == 400


async def test_detokenize_gives_the_text_back(client):
    assert (await client.post("/detokenize", json={"tokens": [104, 105]})).json() == {"prompt": "hi"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize("tokens", [[300], [-1], [2**63], ["a"], 5, None])
async def test_detokenize_refuses_what_is_no_token(client, tokens):
    assert (await client.post("/detokenize", json={"tokens": tokens})).status_code == 400


@pytest.mark.parametrize(
    ("state", "healthy", "health", "ready"),
    [
        (EngineState.LOADING, True, 503, 503),
        (EngineState.READY, True, 200, 200),
        (EngineState.READY, False, 503, 503),  # stuck
        (EngineState.DRAINING, True, 200, 503),
        (EngineState.RESTARTING, True, 503, 503),
        (EngineState.DEAD, True, 503, 503),
    ],
)
async def test_health_is_about_life_and_ready_about_new_requests(client, engine, state, healthy, health, ready):
    engine.state, engine.healthy, engine.state_detail = state, healthy, "/srv/model is broken"
    assert (await client.get("/health")).status_code == health
    assert (await client.get("/ping")).status_code == health
    assert (await client.post("/ping")).status_code == health
    response = await client.get("/ready")
    assert response.status_code == ready
    assert "/srv" not in response.text


@pytest.mark.parametrize("state", EngineState)
async def test_live_is_false_only_when_nothing_but_a_new_server_helps(client, engine, state):
    engine.state = state
    response = await client.get("/live")
    assert response.status_code == (503 if state is EngineState.DEAD else 200)
    assert response.json() == {"status": str(state)}


async def test_live_is_false_if_an_engine_is_stuck_that_cannot_be_killed(client, engine):
    engine.healthy = False
    assert (await client.get("/live")).status_code == 200
    engine.config = EngineConfig(engine_process=False)
    assert (await client.get("/live")).status_code == 503


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
async def test_models_are_503_while_loading(client, engine, path):
    engine.state = EngineState.LOADING
    assert (await client.get(path)).status_code == 503


async def test_version_and_load(client, engine):
    assert (await client.get("/version")).json() == {"version": "0.1.0"}
    engine.num_open_requests = 7
    assert (await client.get("/load")).json() == {"server_load": 7}


async def test_the_same_request_id_twice_is_two_requests(client, engine):
    headers = {"x-request-id": "mine"}
    for _ in range(2):
        response = await client.post("/v1/chat/completions", json={"messages": HELLO}, headers=headers)
        assert response.headers["x-request-id"] == "mine"
    assert len({call.request_id for call in engine.calls}) == 2


async def test_cors_is_closed_by_default(client):
    response = await client.get("/v1/models", headers={"origin": "http://page"})
    assert "access-control-allow-origin" not in response.headers


async def test_allowed_origins_may_call_even_with_keys_and_read_refusals(make_client):
    client = make_client(allowed_origins=("http://page",), api_keys=("k",))
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}
    response = await client.options("/v1/chat/completions", headers=preflight)
    assert response.status_code == 200
    refusal = await client.get("/v1/models", headers={"origin": "http://page"})
    assert refusal.status_code == 401
    assert refusal.headers["access-control-allow-origin"] == "http://page"
    other = await client.get("/v1/models", headers={"origin": "http://other"})
    assert "access-control-allow-origin" not in other.headers


async def test_openapi_describes_the_bodies_in_one_piece(client):
    document = (await client.get("/openapi.json")).json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
    assert "$ref" not in str(body)


async def metrics(client):
    text = (await client.get("/metrics")).text
    return {
        (sample.name, *sorted((k, v) for k, v in sample.labels.items() if k not in ("model_name", "engine"))): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_show_the_engines_statistics_under_vllms_names(client):
    samples = await metrics(client)
    values = {name: samples[(name,)].value for (name, *rest) in samples if not rest}
    assert values["vllm:num_requests_running"] == 3
    assert values["vllm:num_requests_waiting"] == 4
    assert values["vllm:kv_cache_usage_perc"] == 0.5
    assert values["vllm:prompt_tokens_total"] == 1000
    assert values["vllm:generation_tokens_total"] == 2000
    assert values["vllm:prefix_cache_queries_total"] == 100
    assert values["vllm:prefix_cache_hits_total"] == 60
    assert values["vllm:num_preemptions_total"] == 1
    assert values["vllm:spec_decode_num_drafts_total"] == 30
    assert values["vllm:spec_decode_num_draft_tokens_total"] == 90
    assert values["vllm:spec_decode_num_accepted_tokens_total"] == 70
    assert samples[("vllm:num_requests_running",)].labels == {"model_name": "org/tiny", "engine": "0"}
    [info] = [sample for (name, *_), sample in samples.items() if name == "vllm:cache_config_info"]
    assert (info.value, info.labels["block_size"], info.labels["num_gpu_blocks"]) == (1, "16", "100")


async def test_histograms_follow_what_the_engine_tells(client, engine):
    timing = RequestTiming(
        request_id="x",
        finish_reason="length",
        num_prompt_tokens=10,
        num_cached_tokens=0,
        num_generation_tokens=5,
        queue_seconds=0.001,
        prefill_seconds=0.02,
        decode_seconds=0.4,
        first_token_seconds=0.021,
        total_seconds=0.421,
    )
    await metrics(client)
    [listener] = engine.listeners
    listener.on_step(stats=engine.stats(), num_tokens=12, replica=0)
    listener.on_tokens(num_tokens=1, seconds=0.0021, first=True, replica=0)
    listener.on_tokens(num_tokens=2, seconds=0.1, first=False, replica=0)
    listener.on_finished(timing)
    samples = await metrics(client)
    sums = {name: sample.value for (name, *_), sample in samples.items() if name.endswith("_sum")}
    assert sums == pytest.approx(
        {
            "vllm:iteration_tokens_total_sum": 12,
            "vllm:time_to_first_token_seconds_sum": 0.0021,
            "vllm:inter_token_latency_seconds_sum": 0.1,
            "vllm:request_time_per_output_token_seconds_sum": 0.1,
            "vllm:e2e_request_latency_seconds_sum": 0.421,
            "vllm:request_queue_time_seconds_sum": 0.001,
            "vllm:request_prefill_time_seconds_sum": 0.02,
            "vllm:request_decode_time_seconds_sum": 0.4,
            "vllm:request_inference_time_seconds_sum": 0.42,
            "vllm:request_prompt_tokens_sum": 10,
            "vllm:request_generation_tokens_sum": 5,
        }
    )
    assert samples[("vllm:inter_token_latency_seconds_count",)].value == 2
    assert samples[("vllm:request_success_total", ("finished_reason", "length"))].value == 1
    assert samples[("vllm:request_success_total", ("finished_reason", "stop"))].value == 0
    assert samples[("vllm:time_to_first_token_seconds_bucket", ("le", "0.002"))].value == 0
    assert samples[("vllm:time_to_first_token_seconds_bucket", ("le", "0.003"))].value == 1


async def test_request_without_tokens_has_no_latencies(client, engine):
    await metrics(client)
    none = dict.fromkeys(("queue_seconds", "prefill_seconds", "decode_seconds", "first_token_seconds"))
    counts = {"num_prompt_tokens": 1, "num_cached_tokens": 0, "num_generation_tokens": 0}
    engine.listeners[0].on_finished(
        RequestTiming(request_id="x", finish_reason="abort", total_seconds=1.0, **none, **counts)
    )
    samples = await metrics(client)
    assert samples[("vllm:request_prefill_time_seconds_count",)].value == 0
    assert samples[("vllm:e2e_request_latency_seconds_count",)].value == 1


async def test_every_engine_has_its_own_label(client, engine):
    engine.config = EngineConfig(data_parallel=2)
    engine.num_moved_requests = 5
    await metrics(client)
    engine.listeners[0].on_tokens(num_tokens=1, seconds=0.5, first=True, replica=1)
    text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(name):
        return {sample.labels["engine"]: sample.value for sample in samples if sample.name == name}

    assert values("vllm:generation_tokens_total") == {"0": 2000, "1": 2000}
    assert values("vllm:time_to_first_token_seconds_count") == {"0": 0, "1": 1}
    assert values("vllm:cache_config_info") == {"0": 1, "1": 1}
    assert values("aios:engine_ready") == {"0": 1, "1": 1}
    assert [sample.value for sample in samples if sample.name == "aios:requests_moved_total"] == [5]


async def test_restarts_are_counted(client, engine):
    engine.num_restarts = 3
    samples = await metrics(client)
    assert samples[("aios:engine_restarts_total",)].value == 3


async def test_metrics_answer_while_loading(client, engine):
    engine.state = EngineState.LOADING
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert "num_requests_running" not in response.text


def test_the_http_process_never_imports_torch():
    code = (
        "import sys, aios_serve.server, aios_serve.cli\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'transformers' not in sys.modules, 'transformers'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
