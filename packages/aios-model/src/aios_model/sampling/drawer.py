"""The seam at which logits become tokens: bans and penalties have been applied, what is left is to choose.

`TorchDrawer` (`torch_draw.py`) is the reference, on any device. `NativeDrawer` (`native_draw.py`) does the same in C++.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from aios_model.sampling.errors import NonFiniteLogitsError, NoTokenLeftError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from aios_model.sampling.rows import SamplingRow


class Drawer(Protocol):
    """Chooses tokens: the largest logit, or a draw under temperature, min-p, top-k and top-p.

    A row's token depends on its logits, parameters, seed and position, and on nothing else: not on the other rows, nor
    on the number of threads.
    """

    def draw(self, logits_SV: Tensor, indices: Sequence[int], rows: Sequence[SamplingRow]) -> list[int]:
        """Draws one token for each of some rows.

        Args:
            logits_SV: [S, V]. Not modified; may have more rows than are asked for, which are cheaper to pass over than
                to copy.
            indices: Which of its rows to draw from.
            rows: What to draw from each of those.

        Returns:
            Token ids, in the order of `indices`.

        Raises:
            NonFiniteLogitsError: Some rows hold NaN or +inf; names their requests.
            NoTokenLeftError: Some rows are -inf throughout; names their requests.
        """
        ...


def require_finite(largest: Sequence[float], rows: Sequence[SamplingRow]) -> None:
    """Raises what `Drawer.draw` raises.

    Args:
        largest: Each row's largest logit: NaN if any is, else +inf if any is, and -inf only if all are.
        rows: The rows.
    """
    if all(map(math.isfinite, largest)):
        return
    pairs = list(zip(largest, rows, strict=True))
    broken = [row.request_id for value, row in pairs if math.isnan(value) or value == math.inf]
    if broken:
        raise NonFiniteLogitsError(broken)
    raise NoTokenLeftError([row.request_id for value, row in pairs if value == -math.inf])
