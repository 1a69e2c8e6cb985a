"""A checkpoint's decoder, one layer of it in memory at a time.

`load_decoder` fills a whole decoder; a conversion of a model larger than the memory cannot wait for that. Here the
decoder stays empty, whichever layer is asked for is built and filled on its own, and tables are read row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from aios_model.config import ModelConfig
from aios_model.config_file import read_model_config
from aios_model.decoder import DecoderLayer, DecoderModel
from aios_model.errors import CheckpointError
from aios_model.families import family_named
from aios_model.layers.rope import RotaryEmbedding
from aios_model.loader import load_weights, parameter_shapes
from aios_model.model import open_source
from aios_model.weights.hub import ModelFiles
from aios_model.weights.source import TensorEntry

# What lies outside the layers.
_TABLES = ("embedding.weight", "norm.weight", "head.weight")


class LayerwiseCheckpoint:
    """Opens a checkpoint of plain or GGUF weights and reads its parts.

    Args:
        files: Where it is.
        device: Where layers go.

    Attributes:
        config: The model's.

    Raises:
        ModelError: It cannot be read, is of an unknown architecture, or is already quantised (GGUF may be).
    """

    def __init__(self, files: ModelFiles, *, device: torch.device) -> None:
        self.config = read_model_config(files)
        self._device = device
        skeleton = DecoderModel(self.config)
        self._source, self._format = open_source(files, skeleton)
        self._shapes = parameter_shapes(skeleton, self._format)
        for path in _TABLES:
            self.table(path)

    def layer(self, index: int) -> DecoderLayer:
        """Decoder layer `index` in float32, a new copy at each call."""
        layer = DecoderLayer(self.config, self.config.layers[index], layer=index).eval()
        self._fill({f"layers.{index}": layer})
        return layer

    def rotary(self) -> RotaryEmbedding:
        """The rotations, with the frequencies that the file may hold."""
        rotary = RotaryEmbedding(self.config, context_length=self.config.max_position_embeddings)
        self._fill({"rotary": rotary})
        return rotary

    def table(self, path: str) -> TensorEntry:
        """The tensor behind `embedding.weight`, `norm.weight` or `head.weight`; a tied head is the embedding.

        Raises:
            CheckpointError: It is missing, or of another shape than the config says.
        """
        tied = path == "head.weight" and self.config.tie_word_embeddings
        family = family_named(self.config.architecture)
        name = family.locate("embedding.weight" if tied else path, self._format, self.config).name
        entry = self._source.entries().get(name)
        if entry is None:
            raise CheckpointError(f"the checkpoint lacks {name}; it may be incomplete or of another model")
        if entry.shape != self._shapes[name]:
            raise CheckpointError(
                f"tensor {name} has shape {list(entry.shape)}, the config asks for {list(self._shapes[name])}"
            )
        return entry

    def entry(self, name: str) -> TensorEntry | None:
        """A tensor by its name in the file."""
        return self._source.entries().get(name)

    def close(self) -> None:
        """Lets go of the files."""
        self._source.close()

    def _fill(self, modules: Mapping[str, nn.Module]) -> None:
        """Loads modules, which are known by their paths in the decoder, and nothing else.

        Tensors of other modules are hidden, since loading refuses what is left over; unknown ones are not.
        """
        part = cast(DecoderModel, _Part(self.config, modules))
        names = set(parameter_shapes(part, self._format))
        entries = self._source.entries()
        shown = {name: entry for name, entry in entries.items() if name in names or name not in self._shapes}
        load_weights(part, _Shown(shown), file_format=self._format, dtype=torch.float32, device=self._device)


class _Part(nn.Module):
    """Some modules of a decoder under their own paths: as much of a `DecoderModel` as loading needs."""

    def __init__(self, config: ModelConfig, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.config = config
        for path, module in modules.items():
            *folders, name = path.split(".")
            parent: nn.Module = self
            for folder in folders:
                if folder not in dict(parent.named_children()):
                    parent.add_module(folder, nn.Module())
                parent = parent.get_submodule(folder)
            parent.add_module(name, module)


class _Shown:
    """A `WeightSource` of some of another's entries."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = entries

    def entries(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def close(self) -> None:
        """The files belong to another."""
