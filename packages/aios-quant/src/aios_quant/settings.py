"""What `aios-quant quantize` can be asked for. No torch here: wrong options are refused at once."""

from __future__ import annotations

from dataclasses import dataclass

from aios_model.errors import ConfigError

SCHEMES = ("int4", "int8", "int8-a16", "fp8")
METHODS = ("rtn", "awq", "gptq", "awq-gptq")
HEAD_SCHEMES = ("none", "int8")
GROUP_SIZES = (32, 64, 128)
DTYPES = ("auto", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSettings:
    """How a checkpoint is quantised.

    Attributes:
        scheme: `int4` in groups of columns; `int8` per row, whose inputs become INT8 too while the model runs;
            `int8-a16`, whose inputs stay floats; `fp8` (E4M3) per row.
        method: `rtn`, `awq`, `gptq`, or `awq-gptq`: scaled as by AWQ, then rounded as by GPTQ.
        group_size: Columns per scale of INT4; None for 64 where every layer allows it, else 32.
        symmetric: Whether INT4 has no zero points.
        head_scheme: Of the output head: `none` leaves it as it is, `int8` rounds it per row.
        dtype: Of everything that stays floating; `auto` is what the checkpoint declares, if that has 16 bits.
        window: Tokens per calibration window.
        num_windows: Most windows.

    Raises:
        ConfigError: A value is unknown, or two contradict each other.
    """

    scheme: str = "int4"
    method: str = "rtn"
    group_size: int | None = None
    symmetric: bool = True
    head_scheme: str = "none"
    dtype: str = "auto"
    window: int = 512
    num_windows: int = 128

    def __post_init__(self) -> None:
        _check("scheme", self.scheme, SCHEMES)
        _check("method", self.method, METHODS)
        _check("head_scheme", self.head_scheme, HEAD_SCHEMES)
        _check("dtype", self.dtype, DTYPES)
        if self.group_size is not None and self.scheme != "int4":
            raise ConfigError(f"group_size is for int4; {self.scheme} has one scale per row")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size = {self.group_size}; choose 32, 64 or 128")
        if not self.symmetric and self.scheme != "int4":
            raise ConfigError(f"asymmetric grids are for int4; {self.scheme} is symmetric")
        if self.scheme == "fp8" and self.method != "rtn":
            raise ConfigError(f"method {self.method} chooses integer codes; fp8 is rounded to nearest: use method rtn")
        if self.window < 1 or self.num_windows < 1:
            raise ConfigError(f"window = {self.window} and num_windows = {self.num_windows} must be 1 or more")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.scheme == "int4" else 8

    @property
    def head_format(self) -> str:
        """The scheme that the head is stored by: as the layers are, where these are INT8."""
        return "int8" if self.scheme == "int8" else "int8-a16"

    def group_size_for(self, shapes: dict[str, tuple[int, int]]) -> int | None:
        """Columns per scale for weights of these [N, K]; None for whole rows.

        Raises:
            ConfigError: A weight has no whole number of groups; names it.
        """
        if self.scheme != "int4":
            return None
        size = self.group_size or (64 if all(columns % 64 == 0 for _, columns in shapes.values()) else 32)
        for path, (rows, columns) in shapes.items():
            if columns % size:
                fitting = [str(each) for each in GROUP_SIZES if all(k % each == 0 for _, k in shapes.values())]
                advice = f"{' or '.join(fitting)} would fit" if fitting else "no group size fits all; use int8"
                raise ConfigError(f"{path} [{rows}, {columns}] has no whole groups of {size} columns; {advice}")
        return size


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is unknown; choose {', '.join(allowed)}")
