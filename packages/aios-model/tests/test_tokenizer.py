"""The tokenizer of a folder in Hugging Face's layout."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from aios_model.errors import (
    ChatTemplateError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    UnsupportedModelError,
)
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import ModelFiles

TEXTS = ["Hello, world!", "  spaces  ", "naïve 日本語 🙂", "<s>hi</s> <|im_end|> x", "def f():\n\treturn 1\n", ""]


@pytest.fixture(scope="module")
def backend():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, the world says hello"] * 4, trainer)
    return backend


@pytest.fixture
def folder(tmp_path, backend):
    """Writes a model folder: `tokenizer.json` and whatever JSON files are named."""

    def write(*, with_bos=False, **files):
        copy = Backend.from_str(backend.to_str())
        if with_bos:
            copy.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        copy.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def load(root, **options):
    files = ModelFiles(name="m", root=root, format="safetensors", weight_paths=())
    return Tokenizer.from_files(files, **options)


def token(content, **flags):
    defaults = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content} | defaults | flags


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {
            "bos_token": token("<s>", __type="AddedToken"),
            "eos_token": token("<|im_end|>", __type="AddedToken"),
            "add_bos_token": False,  # tokenizer.json decides
        },
        {"eos_token": "</s>", "added_tokens_decoder": {"320": token("<new>"), "321": token("<shown>", special=False)}},
        {"eos_token": "</s>", "additional_special_tokens": ["<extra>", "<other>"]},
        {"eos_token": "</s>", "pad_token": "<brand_new_pad>"},
    ],
)
def test_ids_and_texts_equal_those_of_transformers(folder, config):
    from transformers import PreTrainedTokenizerFast

    root = folder(tokenizer_config=config | {"tokenizer_class": "PreTrainedTokenizerFast"}, with_bos=True)
    reference = PreTrainedTokenizerFast.from_pretrained(root)
    tokenizer = load(root)
    for text in [*TEXTS, "a<new>b<shown>c<extra>d<other>e<brand_new_pad>"]:
        expected = reference(text)["input_ids"]
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert tokenizer.decode(expected, skip_special_tokens=skip) == reference.decode(
                expected, skip_special_tokens=skip
            )
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.eos_token_ids == (reference.eos_token_id,)
    assert tokenizer.vocab_size == len(reference)


def test_special_tokens_written_in_a_text_are_parsed(folder):
    tokenizer = load(folder())
    assert tokenizer.encode("<s></s><|im_end|>") == [0, 1, 2]


def test_every_file_contributes_the_ids_that_end_a_sequence(folder):
    root = folder(
        tokenizer_config={"eos_token": "</s>"},
        config={"eos_token_id": 2},
        generation_config={"eos_token_id": [2, 300, 1]},
    )
    assert load(root).eos_token_ids == (1, 2, 300)


def test_special_tokens_map_is_read_where_the_config_is_silent(folder):
    root = folder(special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}}, tokenizer_config={})
    tokenizer = load(root)
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == (1,)


def test_a_folder_with_tokenizer_json_alone_is_enough(folder, backend):
    tokenizer = load(folder())
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_ids == ()
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("hello") == backend.encode("hello").ids


def test_truncation_and_padding_of_a_training_run_are_ignored(folder):
    root = folder()
    saved = Backend.from_file(str(root / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(root / "tokenizer.json"))
    tokenizer = load(root)
    assert tokenizer.decode(tokenizer.encode("hello world " * 20)) == "hello world " * 20


def test_texts_of_a_batch_are_encoded_as_alone(folder):
    tokenizer = load(folder(with_bos=True))
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", b"bytes", None, 7, ["a", "b"]])
def test_what_is_not_text_is_refused(folder, text):
    with pytest.raises(InvalidRequestError) as error:
        load(folder()).encode(text)
    assert error.value.param == "prompt"


def test_half_a_surrogate_in_a_message_blames_the_messages(folder):
    tokenizer = load(folder(tokenizer_config={"chat_template": "{{ messages[0].content }}"}))
    with pytest.raises(InvalidRequestError, match="character 2") as error:
        tokenizer.encode_chat([{"role": "user", "content": "ab\ud83d"}])
    assert error.value.param == "messages"


def test_encoding_lets_other_threads_run(folder):
    tokenizer = load(folder())
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    tokenizer.encode("hello world, " * 100_000)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(start < moment < end for moment in ticks) >= 3


class TestChatTemplates:
    MESSAGES = [{"role": "user", "content": "hi"}]

    def test_bos_written_by_the_template_is_not_doubled(self, folder):
        template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}</s>{% endif %}"
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
        tokenizer = load(folder(with_bos=True, tokenizer_config=config))
        ids = tokenizer.encode_chat(self.MESSAGES)
        assert ids == [0, *tokenizer.encode("hi", add_special_tokens=False), 1]
        assert tokenizer.encode("hi")[0] == 0

    def test_bos_left_out_by_the_template_stays_out(self, folder):
        tokenizer = load(folder(with_bos=True, tokenizer_config={"chat_template": "{{ messages[0].content }}"}))
        assert tokenizer.encode_chat(self.MESSAGES) == tokenizer.encode("hi", add_special_tokens=False)

    def test_named_templates_are_chosen_by_whether_there_are_tools(self, folder):
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
        tokenizer = load(folder(tokenizer_config={"chat_template": named}))
        assert tokenizer.apply_chat_template(self.MESSAGES) == "plain"
        assert tokenizer.apply_chat_template(self.MESSAGES, tools=[]) == "plain"
        assert tokenizer.apply_chat_template(self.MESSAGES, tools=[{"name": "f"}]) == "f"

    def test_template_files_win_over_the_config(self, folder):
        root = folder(tokenizer_config={"chat_template": "from the config"})
        (root / "chat_template.jinja").write_text("from the file")
        (root / "additional_chat_templates").mkdir()
        (root / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
        tokenizer = load(root)
        assert tokenizer.apply_chat_template(self.MESSAGES) == "from the file"
        assert tokenizer.apply_chat_template(self.MESSAGES, tools=[{}]) == "with tools"

    def test_the_users_template_wins_over_all_as_text_or_as_file(self, folder, tmp_path):
        root = folder(tokenizer_config={"chat_template": "the model's"})
        assert load(root, chat_template="{{ 'typed' }}").apply_chat_template(self.MESSAGES) == "typed"
        (tmp_path / "mine.jinja").write_text("from my file")
        mine = load(root, chat_template=str(tmp_path / "mine.jinja"))
        assert mine.apply_chat_template(self.MESSAGES) == "from my file"
        with pytest.raises(ConfigError, match=r"nowhere\.jinja"):
            load(root, chat_template="nowhere.jinja")

    def test_without_a_template_messages_are_refused_with_the_remedy(self, folder):
        with pytest.raises(ChatTemplateError, match=r"--chat-template"):
            load(folder()).apply_chat_template(self.MESSAGES)

    def test_a_broken_template_leaves_plain_completions_alone(self, folder):
        tokenizer = load(folder(tokenizer_config={"chat_template": "{% if %}"}))
        assert tokenizer.encode("hello")
        with pytest.raises(ChatTemplateError, match="not valid"):
            tokenizer.apply_chat_template(self.MESSAGES)

    def test_several_templates_without_a_default_are_named(self, folder):
        tokenizer = load(folder(tokenizer_config={"chat_template": [{"name": "rag", "template": "x"}]}))
        with pytest.raises(ChatTemplateError, match="rag"):
            tokenizer.apply_chat_template(self.MESSAGES)

    @pytest.mark.parametrize("name", ["messages", "self", "tools_", "bos_token", "add_generation_prompt_"])
    def test_variables_reach_the_template_and_reserved_names_do_not(self, folder, name):
        tokenizer = load(folder(tokenizer_config={"chat_template": "{{ tools_ }}{{ add_generation_prompt_ }}"}))
        if name.endswith("_"):
            assert tokenizer.apply_chat_template(self.MESSAGES, **{name: "seen"}) == "seen"
        else:
            with pytest.raises(InvalidRequestError, match=name) as error:
                tokenizer.apply_chat_template(self.MESSAGES, **{name: "x"})
            assert error.value.param == "chat_template_kwargs"


class TestDamagedFolders:
    def test_no_tokenizer_at_all(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*--tokenizer"):
            load(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
    def test_a_sentencepiece_or_tekken_model_alone_is_refused_with_the_remedy(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"\x00")
        with pytest.raises(UnsupportedModelError, match=f"{name}.*save_pretrained"):
            load(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}', "\x00" * 100])
    def test_a_broken_tokenizer_json_is_named(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "config",
        [
            "{",
            "[1]",
            {"eos_token": 7},
            {"added_tokens_decoder": {"x": "y"}},
            {"added_tokens_decoder": [1]},
            {"chat_template": 7},
            {"chat_template": [{"name": "default"}]},
        ],
    )
    def test_a_broken_config_is_named(self, folder, config):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            load(folder(tokenizer_config=config))

    def test_custom_code_is_never_run(self, folder):
        with pytest.raises(UnsupportedModelError, match="auto_map"):
            load(folder(tokenizer_config={"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}))


def test_importing_the_tokenizer_does_not_import_torch():
    code = (
        "import sys, aios_model.tokenizer.tokenizer, aios_model.tokenizer.from_gguf, aios_model.tokenizer.from_folder\n"
        "import aios_model.generation_config, aios_model.weights.gguf_file\n"
        "from aios_model.tokenizer import Tokenizer, StopStringMatcher, IncrementalDetokenizer, ChatTemplate\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
