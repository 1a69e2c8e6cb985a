"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_model.errors import ChatTemplateError, CheckpointError, ConfigError, InvalidRequestError
from aios_model.tokenizer.chat_template import ChatTemplate
from aios_model.tokenizer.detokenizer import IncrementalDetokenizer
from aios_model.tokenizer.pieces import TokenPieces

if TYPE_CHECKING:
    from aios_model.tokenizer.parts import TokenizerParts
    from aios_model.weights.hub import ModelFiles


class Tokenizer:
    """A model's tokenizer, behaving as `transformers` loads it from the same files.

    Special tokens written in a text are parsed as such; BOS is added where the model wants it. One difference: text is
    never "cleaned up" (a space before a full stop stays), so that streamed text and decoded text are the same.

    Attributes:
        bos_token_id: Beginning-of-sequence id, None where the model has none.
        eos_token_ids: Every id that ends a sequence.
        special_token_ids: Control tokens: what `skip_special_tokens` leaves out.
        vocab_size: Number of tokens, added ones included. A model's output may be padded beyond it.
        pieces: Token id to bytes.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        """
        Raises:
            UnsupportedModelError: The decoder is of a kind that no decoder-only model uses.
        """
        self._backend = parts.backend
        # Files may carry the settings of a training run; a prompt is never cut or padded silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_token_id = parts.bos_token_id
        self.eos_token_ids = parts.eos_token_ids
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.pieces = TokenPieces(self._backend)
        self._special_tokens = parts.special_tokens
        self._template_sources = parts.chat_templates

    @classmethod
    def from_files(cls, files: ModelFiles, *, chat_template: str | None = None) -> Tokenizer:
        """Reads `tokenizer.json` and its companions from a folder, or the metadata of a GGUF file.

        Args:
            files: The model.
            chat_template: Used instead of the model's own: the path of a jinja file, or the template itself.

        Raises:
            CheckpointError: There is no tokenizer, or its files are damaged.
            UnsupportedModelError: It is of a kind we do not read; the message says what to do.
            ConfigError: `chat_template` is neither a template nor a file.
        """
        override = None if chat_template is None else _read_chat_template(chat_template)
        parts = _read_parts(files)
        return cls(parts if override is None else replace(parts, chat_templates={"default": override}))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Builds the tokenizer that the metadata of a GGUF file describes; errors as `from_files`."""
        from aios_model.tokenizer.from_gguf import read_gguf_tokenizer

        return cls(read_gguf_tokenizer(metadata))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in it are parsed; BOS and EOS are added as the model wants them.

        Raises:
            InvalidRequestError: `text` is not a str that has a UTF-8 form (it holds half a surrogate pair).
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on several threads, without holding the interpreter lock."""
        if not all(isinstance(text, str) for text in texts):  # the library would take a list as a text already split
            raise InvalidRequestError(_why_not_text(texts), param="prompt")
        try:
            # The batch call releases the lock, the one for a single text does not; `fast` leaves out offsets.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequestError(_why_not_text(texts), param="prompt") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; ids outside the vocabulary are empty, invalid UTF-8 becomes U+FFFD."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.finish()

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work at all."""
        return bool(self._template_sources)

    def chat_template(self, *, with_tools: bool = False) -> ChatTemplate:
        """The template that a conversation goes through: with tools its `tool_use` template, where it has one.

        Raises:
            ChatTemplateError: There is none, or it is not valid.
        """
        if not self._template_sources:
            raise ChatTemplateError(
                "the model has no chat template, so it cannot take messages; use plain completions, "
                "or start with --chat-template FILE"
            )
        name = "tool_use" if with_tools and "tool_use" in self._template_sources else "default"
        if name not in self._template_sources:
            known = ", ".join(sorted(self._template_sources))
            raise ChatTemplateError(f"the model has several chat templates ({known}) and none is called 'default'")
        return self._compiled[name]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model was trained to read it.

        Args:
            messages: `role` and `content` each, and whatever else the template knows (OpenAI's shape).
            tools: Functions the model may call; its `tool_use` template is taken where it has one.
            add_generation_prompt: End with the opening of the assistant's turn.
            kwargs: Further template variables (`enable_thinking`, ...), as a request's `chat_template_kwargs` gives.

        Raises:
            ChatTemplateError: There is no template, or it refused the messages: the text is the template's own.
            InvalidRequestError: A message is malformed, or `kwargs` override what is not theirs.
        """
        template = self.chat_template(with_tools=bool(tools))
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=kwargs)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of `apply_chat_template`.

        The template decides about BOS, none is added here: where it writes one there is one, never two. That is what
        the model saw in training, and what `transformers` and vLLM do.
        """
        text = self.apply_chat_template(messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs)
        try:
            return self.encode(text, add_special_tokens=False)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param="messages") from error

    def token_text(self, token_id: int) -> str:
        """One token alone as text, for log probabilities; a part of a character shows as U+FFFD."""
        return self.pieces[token_id].decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One token alone as the bytes it adds to a running text; empty outside the vocabulary."""
        return self.pieces[token_id]

    @cached_property
    def _compiled(self) -> _CompiledTemplates:
        return _CompiledTemplates(self._template_sources, self._special_tokens)


class _CompiledTemplates(dict[str, ChatTemplate]):
    """Templates by name, compiled at first use: a broken one must not stop plain completions."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        super().__init__()
        self._sources = sources
        self._special_tokens = special_tokens

    def __missing__(self, name: str) -> ChatTemplate:
        self[name] = template = ChatTemplate(self._sources[name], special_tokens=self._special_tokens)
        return template


def _read_parts(files: ModelFiles) -> TokenizerParts:
    # Imported here: a reader of one format does not pay for the other.
    if files.format == "gguf":
        from aios_model.tokenizer.from_gguf import has_tokenizer, read_gguf_tokenizer
        from aios_model.weights.gguf_file import GGUFFile

        with GGUFFile(files.weight_paths[0]) as file:
            metadata = file.metadata
        if has_tokenizer(metadata):
            return read_gguf_tokenizer(metadata)
        if not (files.root / "tokenizer.json").exists():
            raise CheckpointError(
                f"{files.weight_paths[0]} carries no tokenizer; put its tokenizer.json beside it, "
                "or name a model that has one with --tokenizer"
            )
    from aios_model.tokenizer.from_folder import read_folder_tokenizer

    return read_folder_tokenizer(files.root, name=files.name)


def _read_chat_template(path_or_text: str) -> str:
    if "{{" in path_or_text or "{%" in path_or_text:
        return path_or_text
    try:
        return Path(path_or_text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat template {path_or_text!r} is neither a jinja template nor a readable file: {error}"
        ) from error


def _why_not_text(texts: Sequence[Any]) -> str:
    for text in texts:
        if not isinstance(text, str):
            return f"a prompt must be text, got {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"the text has no UTF-8 form: {error.reason} (character {error.start})"
    return "the text cannot be encoded"
