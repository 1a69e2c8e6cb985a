"""Chat templates for tests in the manner of the families, short and of our own, and a tokenizer to go with them."""

import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from aios_model.tokenizer.parts import TokenizerParts
from aios_model.tokenizer.tokenizer import Tokenizer

PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"

HERMES = """
{%- if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}
Write <tool_call>{"name": ..., "arguments": ...}</tool_call>.
{%- endif %}
{%- for message in messages %}
<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "city": "{{ call.function.arguments.city }}"}</tool_call>
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
<assistant>{% endif %}"""

MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- for call in message.tool_calls or [] %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
[TOOL_CALLS]{{ call.function.name }}{{ call.id }}
{%- endfor %}
<{{ message.role }}{{ message.tool_call_id }}>{{ message.content }}
{%- endfor %}"""

LLAMA = """
{%- if tools %}<|python_tag|> may precede {"name": ..., "parameters": ...}: {{ tools | tojson }}{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}: {{ message.content }}{% endfor %}"""

THINKING = """
{%- for message in messages %}
<{{ message.role }}>{{ message.content.split("</think>")[-1] }}
{%- if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<assistant>{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% elif open_thinking %}<think>
{% endif %}{% endif %}"""

THINKING_WITH_TOOLS = HERMES + "{# </think> #}"


def byte_tokenizer(template=PLAIN, *, special_tokens=()):
    """Ids 0..255 are the bytes of UTF-8, special tokens follow."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(BPE(vocab={symbols[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special_tokens])
    return Tokenizer(TokenizerParts(backend=backend, eos_token_ids=(), chat_templates={"default": template}))
