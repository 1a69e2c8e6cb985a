"""Chat templates: rendered as transformers does, and kept within bounds."""

from __future__ import annotations

import threading
import time
import tracemalloc
from datetime import datetime

import pytest

from aios_model.errors import ChatTemplateError, InvalidRequestError
from aios_model.tokenizer.chat_template import ChatTemplate
from aios_model.tokenizer.template_sandbox import TemplateLimits

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source, special_tokens=TOKENS).render(messages, **options)


# Short templates that use what those of the model families use.
LLAMA3 = """\
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}{{- "You can call:" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- elif message.role == "tool" %}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}
"""
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}{%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
MISTRAL = """\
{%- set dialogue = messages | rejectattr("role", "equalto", "system") | list %}
{%- set rules = messages | selectattr("role", "equalto", "system") | map(attribute="content") | join("; ") %}
{{- bos_token }}
{%- for message in dialogue %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) and not tools %}
        {{- raise_exception("roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message.role == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[TOOLS]" + (tools | map(attribute="function") | list) | tojson }}
        {%- endif %}
        {%- if loop.last and rules %}{{- "[INST] " + rules + "\\n\\n" + message.content + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}{{- out[:-1] }}{{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- else %}{% generation %}{{- " " + message.content|trim + eos_token }}{% endgeneration %}{%- endif %}
{%- endfor %}
"""
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MACROS = """\
{%- macro show(schema, depth=0) -%}
    {%- for name, value in schema.items() | sort -%}
        {{ "  " * depth }}{{ name }}:{% if value is mapping %}{{ "\\n" ~ show(value, depth + 1) }}
        {%- else %} {{ value | string | upper }}
{% endif %}
    {%- endfor -%}
{%- endmacro -%}
{% for tool in tools or [] %}
{{ show(tool) }}
{% endfor %}
{% for message in messages %}
    {% if message.content is none or not message.content %}
    {% continue %}
    {% endif %}
[{{ message.role | title }}] {{ message.content | replace("\\n", " / ") | indent(2) }}
    {% if loop.index >= 4 %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now("%Y") }} {{ "%s-%d" % ("a", 3) }} {{ "{}+{}".format(1, 2) }} {{ dict(a=1) }} {{ [1, 2] + [3] }}
"""
LISTS = """\
{%- for message in messages %}{{- message.role }}:
    {%- if message.content is string %}{{- message.content }}
    {%- else %}{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
    {%- endif %}
{%- endfor %}"""

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Météo <b>&'", "parameters": {"z": {"type": "string"}, "a": 1}},
}
CALL = {
    "id": "abc",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "n": [1, None]}},
}
CONVERSATIONS = {
    "plain": ([{"role": "user", "content": "Hi"}], {}),
    "system": ([{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\nthere"}], {}),
    "turns": (
        [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne. "},
            {"role": "user", "content": "Two 🙂?"},
        ],
        {"add_generation_prompt": False},
    ),
    "tools": (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "12 °C", "tool_call_id": "abc"},
        ],
        {"tools": [TOOL]},
    ),
    "variables": ([{"role": "user", "content": "Hi"}], {"enable_thinking": False, "date_string": "1 May"}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
}
TEMPLATES = {"llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL, "chatml": CHATML, "macros": MACROS, "lists": LISTS}


# Parts are for templates that take them: with the others transformers would fail or print the list.
PROMPTS = [(t, c) for t in TEMPLATES for c in CONVERSATIONS if c != "parts" or t == "lists"]


@pytest.mark.parametrize(("template", "conversation"), PROMPTS)
def test_prompts_equal_those_of_transformers(template, conversation):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, options = CONVERSATIONS[conversation]
    options = {"add_generation_prompt": True, "tools": None} | options
    source = TEMPLATES[template]
    [expected], _ = render_jinja_template([messages], chat_template=source, **options, **TOKENS)
    named = {name: options.pop(name) for name in ("add_generation_prompt", "tools")}
    assert render(source, messages, **named, variables=options) == expected


def test_a_template_refuses_messages_in_its_own_words():
    with pytest.raises(ChatTemplateError) as error:
        render(MISTRAL, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    assert str(error.value) == "roles must alternate user/assistant"


def test_json_keeps_letters_and_order():
    assert render('{{ {"b": "é<&>\'", "a": 1} | tojson }}') == '{"b": "é<&>\'", "a": 1}'


def test_strftime_now_gives_the_date():
    assert render("{{ strftime_now('%Y-%m-%d') }}") == datetime.now().strftime("%Y-%m-%d")


class TestMessages:
    def test_parts_of_text_become_one_text_where_the_template_reads_text(self):
        parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
        assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb\nc"

    @pytest.mark.parametrize(
        "loop",
        [
            "{% for part in messages[0].content %}{{ part.text }};{% endfor %}",
            "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }};{% endfor %}{% endfor %}",
            "{% set content = messages[0]['content'] %}{% for part in content %}{{ part.text }};{% endfor %}",
        ],
    )
    def test_text_becomes_a_part_where_the_template_reads_nothing_but_parts(self, loop):
        assert render(loop, USER) == "hi;"
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert render(loop, [{"role": "user", "content": parts}]) == "a;b;"

    def test_null_content_is_empty_and_null_members_are_absent(self):
        message = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}
        source = "[{{ messages[0].content }}]{{ 'tool_calls' in messages[0] }}"
        assert render(source, [message]) == "[]False"

    def test_arguments_of_past_calls_become_objects(self):
        call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}
        source = "{{ messages[0].tool_calls[0].function.arguments.city }}"
        assert render(source, [{"role": "assistant", "tool_calls": [call]}]) == "Paris"

    def test_the_callers_messages_stay_as_they_were(self):
        call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        render("x", [message])
        assert message == {"role": "assistant", "content": None, "tool_calls": [call]}
        assert call["function"]["arguments"] == "{}"

    @pytest.mark.parametrize(
        ("messages", "where"),
        [
            ([], "must not be empty"),
            ("hi", "must be a list, got str"),
            (None, "must be a list"),
            ({"role": "user"}, "must be a list"),
            (["hi"], r"messages\[0\] must be an object"),
            ([{"content": "hi"}], r"messages\[0\]\.role"),
            ([{"role": 7, "content": "hi"}], "role"),
            ([{"role": "", "content": "hi"}], "role"),
            ([*USER, {"role": "user", "content": 7}], r"messages\[1\]\.content must be text"),
            ([{"role": "user", "content": {"text": "a"}}], "content"),
            ([{"role": "user", "content": [7]}], r"content\[0\]"),
            ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text must be text"),
            ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "'image_url'"),
            ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio'"),
            ([{"role": "user", "content": [{"type": "image"}]}], "'image'"),
            ([{"role": "user", "content": "hi", "name": object()}], "object"),
            ([{"role": "assistant", "tool_calls": "f()"}], "tool_calls must be a list"),
            ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], r"\[0\]\.function\.arguments"),
        ],
    )
    def test_a_malformed_message_is_refused_and_located(self, messages, where):
        with pytest.raises(InvalidRequestError, match=where) as error:
            render("x", messages)
        assert error.value.param == "messages"

    def test_data_nested_without_end_is_refused(self):
        deep = []
        for _ in range(5000):
            deep = [deep]
        with pytest.raises(InvalidRequestError, match="nested"):
            render("x", USER, tools=[{"function": deep}])


class TestVariables:
    @pytest.mark.parametrize(
        "name",
        [
            *("messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"),
            *("bos_token", "eos_token", "pad_token"),
            *("raise_exception", "strftime_now", "namespace", "range"),
            *("self", "__class__", "a b"),
        ],
    )
    def test_reserved_names_cannot_be_set(self, name):
        with pytest.raises(InvalidRequestError, match="chat_template_kwargs") as error:
            render("x", variables={name: "x"})
        assert error.value.param == "chat_template_kwargs"

    def test_objects_do_not_reach_the_template(self):
        with pytest.raises(InvalidRequestError, match="no JSON value"):
            render("{{ x.__dict__ }}", variables={"x": threading.Lock()})


ATTACKS = [
    "{{ lipsum.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ()|attr('__class__') }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ (1).to_bytes(10) }}",
    "{{ 'a'.encode() }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_reaches_for_python_is_refused(attack):
    with pytest.raises(ChatTemplateError):
        render(attack)


RUNAWAYS = [
    "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% set r = range(100000) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{{ range(100000) | list | length }}{% endfor %}",
    "{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
    "{% for i in range(100000) %}{% if messages == messages %}{{ 'a' * 10000 }}{% endif %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in 'ab' recursive %}{{ loop('ab') }}{% endfor %}",
    "{{ 'a' * 10 ** 12 }}",
    "{{ [1] * 10 ** 12 }}",
    "{{ 10 ** 10 ** 10 }}" + "{{ 2 ** (10 ** 9) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = t %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(99) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(99) %}{% set ns.s = {1: ns.s, 2: ns.s} %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% for i in range(99) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s }}",
    "{{ 'a'.center(10 ** 12) }}",
    "{{ 'a'.zfill(10 ** 12) }}",
    "{{ ('a\t' * 1000).expandtabs(10 ** 6) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ ('{0}' * 10000).format('a' * 10000) }}",
    "{{ ('a' * 10000).replace('', 'b' * 10000) }}",
    "{{ ('a' * 10000) | replace('a', 'b' * 10000) }}",
    "{{ ('a\n' * 10000) | indent(10000) }}",
    "{{ ('a' * 10000) | list | join('b' * 10000) }}",
    "{{ ('b' * 10000).join(['a'] * 10000) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ range(10 ** 12) | list }}",
    "{{" + "(" * 5000,
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
]


@pytest.mark.parametrize("source", RUNAWAYS)
def test_a_template_that_runs_away_is_stopped_in_time_and_memory(source):
    limits = TemplateLimits(cpu_seconds=0.05, num_chars=2**20)
    start = time.thread_time()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, limits=limits).render(USER)
    assert time.thread_time() - start < 0.5
    tracemalloc.start()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, limits=limits).render(USER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_a_prompt_longer_than_allowed_is_refused():
    template = ChatTemplate("{% for i in range(100) %}{{ messages[0].content }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match="longer than"):
        template.render([{"role": "user", "content": "x" * 2**20}])
    assert len(template.render([{"role": "user", "content": "x" * 1000}])) == 100_000


def test_the_clock_starts_anew_for_every_prompt():
    source = "{% for i in range(2000) %}{{ 'x' }}{% endfor %}"
    template = ChatTemplate(source, limits=TemplateLimits(cpu_seconds=0.1))
    start = time.thread_time()
    while time.thread_time() - start < 0.15:
        assert len(template.render(USER)) == 2000


def test_threads_render_with_one_template_at_the_same_time():
    template = ChatTemplate(QWEN3, special_tokens=TOKENS)
    expected = [template.render([{"role": "user", "content": f"message {i}"}]) for i in range(8)]
    results = [None] * 8

    def work(i):
        results[i] = {template.render([{"role": "user", "content": f"message {i}"}]) for _ in range(20)}

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{text} for text in expected]


def test_a_long_conversation_is_far_from_the_limits():
    messages = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "word " * 40}] * 500
    start = time.thread_time()
    text = render(QWEN3, messages)
    assert time.thread_time() - start < 0.4
    assert len(text) > 200_000


def test_a_template_tells_its_source_and_the_names_that_it_knows():
    template = ChatTemplate("{% if tools is defined %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}")
    assert {"tools", "messages"} <= template.names
    assert "tools" not in ChatTemplate("{{ messages[0].content }} tools").names
    assert ChatTemplate("{{ 1 }}").source == "{{ 1 }}"
