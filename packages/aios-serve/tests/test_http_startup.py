"""What the terminal shows: progress, the report, and log lines that leave probes out."""

from __future__ import annotations

import asyncio
import io
import logging
import shlex
from dataclasses import replace
from types import SimpleNamespace

import chat_templates
import pytest
from rich.console import Console

from aios_serve.answers.plan import describe_formats
from aios_serve.async_engine import EngineState
from aios_serve.listen import Address
from aios_serve.logging_setup import configure_logging
from aios_serve.server_config import ServerConfig
from aios_serve.startup_report import curl_example, ready_lines, show_progress

ADDRESS = Address(url="http://127.0.0.1:8000")


@pytest.fixture
def logs():
    """Restore the loggers that `configure_logging` sets up."""
    loggers = [logging.getLogger(name) for name in (None, "uvicorn.access", "uvicorn.error")]
    before = [(logger, logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
    yield
    for logger, level, handlers, filters in before:
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters


async def load(engine, console, *details):
    """Show the progress of an engine that goes through `details`; returns what was written."""
    engine.state = EngineState.LOADING
    progress = asyncio.create_task(show_progress(engine, console))
    for detail in details:
        engine.state_detail = detail
        await asyncio.sleep(0.25)
    engine.state = EngineState.READY
    await asyncio.wait_for(progress, 2)
    return console.file.getvalue()


async def test_plain_progress_is_one_line_per_stage(engine):
    console = Console(file=io.StringIO())
    text = await load(engine, console, "importing torch", "loading weights 10%", "loading weights 60%")
    assert text == "importing torch ...\nloading weights 10% ...\n"


async def test_progress_on_a_terminal_changes_one_line(engine):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    text = await load(engine, console, "importing torch", "loading weights 10%", "loading weights 60%")
    assert "loading weights 60%" in text
    assert "\x1b[" in text


async def test_report_marks_what_was_chosen_automatically(engine):
    lines = "\n".join(ready_lines(engine, ADDRESS, needs_key=False))
    assert "float32 (auto) on cpu (auto), 2 threads (auto)" in lines
    engine.config = type(engine.config)(model="org/model", revision="main", dtype="float32", threads=2)
    lines = "\n".join(ready_lines(engine, ADDRESS, needs_key=True))
    assert "from org/model at main" in lines
    assert "float32 on cpu (auto), 2 threads\n" in lines
    assert "needs an API key" in lines


async def test_report_says_what_is_offloaded(engine):
    assert "offload" not in "\n".join(ready_lines(engine, ADDRESS, needs_key=False))
    engine.config = type(engine.config)(cpu_offload_gb=1.5)
    built = replace(engine.info, num_offloaded_bytes=1_700_000_000, num_staging_bytes=100_000_000)
    report = SimpleNamespace(
        info=built, config=engine.config, model_names=("m",), model_name="m", tokenizer=engine.tokenizer
    )
    lines = "\n".join(ready_lines(report, ADDRESS, needs_key=False))
    assert "offload   1,700 MB of them in host memory (--cpu-offload-gb 1.5), through 100 MB of buffers" in lines


@pytest.mark.parametrize(
    ("template", "options", "words"),
    [
        ("HERMES", {}, "tools as hermes (auto)"),
        ("THINKING_WITH_TOOLS", {"tool_call_parser": "mistral"}, "tools as mistral, thoughts as qwen3 (auto)"),
        ("THINKING", {"reasoning_parser": "deepseek_r1"}, "thoughts as deepseek_r1"),
        ("HERMES", {"enable_auto_tool_choice": False}, None),
        ("PLAIN", {}, None),
        (
            "PLAIN",
            {"tool_call_parser": "hermes"},
            "no tools, whatever --tool-call-parser says: the chat template knows",
        ),
    ],
)
async def test_report_says_how_answers_are_read(engine, template, options, words):
    formats = describe_formats(
        chat_templates.byte_tokenizer(getattr(chat_templates, template)), ServerConfig(**options)
    )
    lines = "\n".join(ready_lines(engine, ADDRESS, needs_key=False, formats=formats))
    assert f"  answers   {words}" in lines if words else "answers" not in lines


async def test_report_names_replicas(engine):
    assert "replicas" not in "\n".join(ready_lines(engine, ADDRESS, needs_key=False))
    engine.config = type(engine.config)(data_parallel=3, data_parallel_routing="session")
    lines = "\n".join(ready_lines(engine, ADDRESS, needs_key=False))
    assert "replicas  3 engines, requests routed by session" in lines


async def test_example_fits_model_address_and_key(engine):
    address = Address(url="http://localhost", curl_options=("--unix-socket", "/tmp/a b"))
    example = curl_example(engine, address, needs_key=True)
    words = shlex.split(example)
    assert words[:3] == ["curl", "--unix-socket", "/tmp/a b"]
    assert "http://localhost/v1/chat/completions" in words
    assert 'Bearer $AIOS_API_KEY"' in example
    engine.tokenizer.has_chat_template = False
    assert "http://localhost/v1/completions" in curl_example(engine, address, needs_key=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_probes_leave_no_access_lines_unless_they_fail(logs, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    configure_logging("info", console)
    access = logging.getLogger("uvicorn.access")
    for path, status in (
        ("/health", 200),
        ("/metrics?x=1", 200),
        ("/v1/models", 503),
        ("/health", 503),
        ("/ready", 500),
    ):
        access.info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", path, "1.1", status)
    text = console.file.getvalue()
    assert "/v1/models" in text
    assert "/ready" in text
    assert "/health" not in text
    assert "/metrics" not in text


def test_log_level_decides_what_is_said(logs):
    console = Console(file=io.StringIO(), force_terminal=False)
    configure_logging("warning", console)
    logging.getLogger("aios_serve.server").info("quiet")
    logging.getLogger("aios_serve.server").warning("loud")
    assert "loud" in console.file.getvalue()
    assert "quiet" not in console.file.getvalue()
