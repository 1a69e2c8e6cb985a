"""Which layers stay in host memory. No torch here.

They are spread evenly between those that stay on the device: while a resident layer computes, the next offloaded one is
copied. A block of neighbours at the end would leave the link idle during the first layers and the device during the
last ones, where each copy would be waited for.
"""

from __future__ import annotations

from collections.abc import Sequence


def choose_layers(layer_bytes: Sequence[int], num_bytes: int) -> list[int]:
    """The fewest evenly spread layers that have `num_bytes` together; all of them if they have less.

    Args:
        layer_bytes: Of each layer.
        num_bytes: What is to stay in host memory.

    Returns:
        Their indices, ascending.
    """
    for count in range(len(layer_bytes)):
        chosen = spread(len(layer_bytes), count)
        if sum(layer_bytes[index] for index in chosen) >= num_bytes:
            return chosen
    return list(range(len(layer_bytes)))


def spread(num_layers: int, count: int) -> list[int]:
    """`count` of `num_layers` indices, as far apart as can be; each is the last of its stretch.

    So the first layers of a step are resident ones, and give the first copy time.
    """
    return [(place + 1) * num_layers // count - 1 for place in range(count)]
