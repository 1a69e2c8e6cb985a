"""What serving needs to know of a model beside its weights: files, shape, tokenizer, sampling defaults. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aios_model.config_file import read_model_config
from aios_model.errors import ConfigError
from aios_model.generation_config import GenerationDefaults
from aios_model.tokenizer.tokenizer import Tokenizer
from aios_model.weights.hub import resolve_model
from aios_serve.launching import resolve_executor
from aios_serve.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from aios_model.config import ModelConfig
    from aios_model.weights.hub import ModelFiles
    from aios_serve.config import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as the HTTP process knows it.

    Attributes:
        names: Every name requests may use, the first of them in answers.
        files: Where the checkpoint is.
        config: Its shape.
        tokenizer: Its tokenizer, or the configured one, with the configured chat template.
        generation_defaults: Sampling defaults to apply where a request says nothing.
        eos_token_ids: Tokens that end a sequence.
    """

    names: tuple[str, ...]
    files: ModelFiles
    config: ModelConfig
    tokenizer: Tokenizer
    generation_defaults: GenerationDefaults
    eos_token_ids: tuple[int, ...]

    def vocabulary(self) -> Vocabulary:
        """The tokens, as constraints on outputs see them."""
        return Vocabulary.of(self.tokenizer, eos_token_ids=self.eos_token_ids, vocab_size=self.config.vocab_size)

    @classmethod
    def read(cls, config: EngineConfig, files: ModelFiles) -> ServedModel:
        """Read everything but the weights.

        Raises:
            UnsupportedModelError, CheckpointError, ConfigError: with what to do about it.
        """
        tokenizer = Tokenizer.from_files(_tokenizer_files(config, files), chat_template=config.chat_template)
        own_defaults = GenerationDefaults.from_files(files)
        return cls(
            names=config.served_model_name or (files.name,),
            files=files,
            config=read_model_config(files, allow_quantized=True),
            tokenizer=tokenizer,
            generation_defaults=_generation_defaults(config, files, own_defaults),
            eos_token_ids=tuple(dict.fromkeys((*tokenizer.eos_token_ids, *own_defaults.eos_token_ids))),
        )


def find_model(config: EngineConfig) -> ModelFiles:
    """The files of the configured model, downloaded if need be."""
    return resolve_model(
        config.model, revision=config.revision, download_dir=config.download_dir, load_format=config.load_format
    )


def served_vocabulary(config: EngineConfig, files: ModelFiles) -> Vocabulary:
    """The tokens of the model in `files`, as constraints on outputs see them; takes a fraction of a second."""
    return ServedModel.read(config, files).vocabulary()


def local_config(config: EngineConfig, files: ModelFiles) -> EngineConfig:
    """`config` with the model as a path on this machine, so that another process finds the very same files.

    Ranks on other machines have to find the model by themselves: then its name stays what it was.
    """
    path = files.weight_paths[0] if files.format == "gguf" else files.root
    names = config.served_model_name or (files.name,)
    if config.num_ranks > 1 and resolve_executor(config) != "mp":
        return replace(config, served_model_name=names)
    return replace(config, model=str(path), revision=None, download_dir=None, served_model_name=names)


def _tokenizer_files(config: EngineConfig, files: ModelFiles) -> ModelFiles:
    if config.tokenizer is None:
        return files
    return resolve_model(config.tokenizer, download_dir=config.download_dir, tokenizer_only=True)


def _generation_defaults(config: EngineConfig, files: ModelFiles, own: GenerationDefaults) -> GenerationDefaults:
    if config.generation_config == "auto":
        return own
    if config.generation_config == "none":
        return GenerationDefaults(eos_token_ids=own.eos_token_ids)
    folder = Path(config.generation_config)
    if not (folder / "generation_config.json").is_file():
        raise ConfigError(
            f"generation_config={config.generation_config!r} cannot be used: give auto, none, or a folder that holds "
            "a generation_config.json"
        )
    return GenerationDefaults.from_files(replace(files, root=folder, format="safetensors"))
