"""Options of `aios-serve`: which model, and what is made of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from aios_serve.config import Device, DType, LoadFormat

_option = partial(typer.Option, rich_help_panel="Model")

Model = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Folder, GGUF file or hub name.", show_default="bundled")
]
ServedModelName = Annotated[
    list[str] | None,
    _option(
        "--served-model-name",
        metavar="NAME",
        help="What requests call the model. Can be given several times; the first stands in answers.",
    ),
]
Tokenizer = Annotated[str | None, _option("--tokenizer", help="Take the tokenizer from here instead.")]
Revision = Annotated[str | None, _option("--revision", help="Branch, tag or commit on the hub.")]
DownloadDir = Annotated[
    Path | None, _option("--download-dir", help="Folder for downloads, instead of the hub's cache.")
]
LoadFormatOption = Annotated[
    LoadFormat,
    _option("--load-format", help="Which weights to read. dummy draws random ones."),
]
Quantization = Annotated[
    str,
    _option(
        "--quantization",
        "-q",
        metavar="SCHEME",
        help="Bits per weight: int8, int4, int4-g32, fp8, as-stored (a packed file as it is), none. "
        "auto: on a CPU as-stored for packed files, int8 for others.",
    ),
]
DTypeOption = Annotated[
    DType,
    _option(
        "--dtype",
        help="Numbers to compute with, and weights unless quantised. auto: float32 on CPU, else the file's.",
    ),
]
DeviceOption = Annotated[Device, _option("--device", help="auto takes a GPU if there is one.")]
MaxModelLen = Annotated[
    str,
    _option(
        "--max-model-len",
        metavar="TOKENS",
        help="Longest prompt plus answer: 8192, 8k, or auto for what the model and the memory allow.",
    ),
]
GenerationConfig = Annotated[
    str,
    _option(
        "--generation-config",
        metavar="auto|none|FOLDER",
        help="Where sampling defaults come from: the model (auto), nowhere (none), or a folder.",
    ),
]
ChatTemplate = Annotated[
    str | None,
    _option("--chat-template", metavar="FILE", help="Jinja template to use instead of the model's."),
]
MaxLogprobs = Annotated[int, _option("--max-logprobs", help="Most alternatives per token that a request may ask for.")]
Seed = Annotated[int, _option("--seed", help="Seeds requests that bring no seed of their own, and dummy weights.")]
