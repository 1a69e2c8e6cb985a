"""The folder a checkpoint is written to, shard by shard, so that an interrupted conversion can go on.

    quantization.json             what is being made of what, and how many layers are finished
    model-00001-of-00032.…        the embedding, then a shard per layer, then the last norm and the head
    calibration-00007.safetensors hidden states in front of layer 7; gone at the end
    config.json                   written last: without it the folder is no model

Every file appears under its name only once it is complete, and `quantization.json` counts a layer only after its
files; whenever the process dies, what the count promises is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from aios_model.errors import AiosError, ConfigError
from aios_quant.writing.tokenizer_files import write_json

RECIPE = "quantization.json"
_INDEX = "model.safetensors.index.json"
_PARTIAL = ".partial"


class OutputFolder:
    """An output that is new, or was begun with the same recipe.

    Args:
        path: The folder; created if need be.
        recipe: All that decides what is written, as JSON values.
        num_layers: Of the model.

    Attributes:
        path: The folder.
        num_finished: Layers whose shards are complete.
        is_complete: Whether nothing is left to do.

    Raises:
        ConfigError: The folder holds something else, or was begun with another recipe.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], *, num_layers: int) -> None:
        self.path = path
        self._recipe = json.loads(json.dumps(recipe))
        self._num_shards = num_layers + 2
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path} cannot be made a folder: {error.strerror or error}") from error
        state = self._read_state()
        self.num_finished: int = state["finished_layers"]
        self.is_complete: bool = state["complete"]
        self._write_state()

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes shard `number`: 0 for the embedding, then the layers, then the rest."""
        _save(self._shard(number), {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    def finish_layer(self, index: int, hidden_WSD: Tensor | None) -> None:
        """Counts layer `index`, whose shard was written; `hidden_WSD` is what goes into the next one."""
        if hidden_WSD is not None:
            _save(self._hidden(index + 1), {"hidden": hidden_WSD.cpu()})
        self.num_finished = index + 1
        self._write_state()
        self._hidden(index).unlink(missing_ok=True)

    def read_hidden(self) -> Tensor:
        """The hidden states in front of the first layer that is not finished."""
        return load_file(self._hidden(self.num_finished))["hidden"]

    def finish(self, config: dict[str, Any]) -> int:
        """Writes the index and `config.json`, removes what only the conversion needed; bytes of all shards."""
        shards = [self._shard(number) for number in range(self._num_shards)]
        weight_map = {name: shard.name for shard in shards for name in _tensor_names(shard)}
        num_bytes = sum(shard.stat().st_size for shard in shards)
        write_json(self.path / _INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        write_json(self.path / "config.json", config)
        for leftover in (*self.path.glob("calibration-*.safetensors"), *self.path.glob(f"*{_PARTIAL}")):
            leftover.unlink()
        self.is_complete = True
        self._write_state()
        return num_bytes

    def _read_state(self) -> dict[str, Any]:
        recipe_path = self.path / RECIPE
        if not recipe_path.exists():
            if any(not path.name.endswith(_PARTIAL) for path in self.path.iterdir()):
                raise ConfigError(f"{self.path} is not empty and was not begun by aios-quant; choose a new folder")
            return {"finished_layers": 0, "complete": False}
        try:
            state = json.loads(recipe_path.read_text(encoding="utf-8"))
            recipe, _ = state["recipe"], (int(state["finished_layers"]), bool(state["complete"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{recipe_path} is damaged ({error}); choose a new folder, or remove this one") from error
        if recipe != self._recipe:
            raise ConfigError(
                f"{self.path} was begun with other settings ({_difference(recipe, self._recipe)}); "
                "give the same ones to go on, choose a new folder, or remove this one"
            )
        return state

    def _write_state(self) -> None:
        state = {"recipe": self._recipe, "finished_layers": self.num_finished, "complete": self.is_complete}
        write_json(self.path / RECIPE, state)

    def _shard(self, number: int) -> Path:
        return self.path / f"model-{number + 1:05}-of-{self._num_shards:05}.safetensors"

    def _hidden(self, layer: int) -> Path:
        return self.path / f"calibration-{layer:05}.safetensors"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod((path.parent / RECIPE).stat().st_mode)  # safetensors leaves it readable for its owner only
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise AiosError(f"{path} cannot be written ({error}); mend that, and the same command goes on") from error


def _tensor_names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return sorted(file.keys())


def _difference(before: Any, now: Any, name: str = "") -> str:
    """The first fields in which two recipes differ, such as `group_size: 64, now 32`."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{name}: {before}, now {now}"
    fields = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(_difference(before.get(key), now.get(key), key) for key in fields[:3])
