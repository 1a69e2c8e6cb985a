"""How long prompts and answers are: log-normal, as conversations are, or all alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormalLengths:
    """Lengths whose logarithm is normally distributed, cut off at both ends.

    Attributes:
        mean: Mean of the distribution before it is cut off, in tokens.
        sigma: Standard deviation of the logarithm; 0 makes all lengths alike.
        low: Shortest length; shorter ones become that long.
        high: Longest length; longer ones become that long.

    Raises:
        ConfigError: A field is out of range.
    """

    mean: float
    sigma: float
    low: int = 1
    high: int = 1 << 20

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1):
            raise ConfigError(f"a mean length of {self.mean} tokens cannot be used: give 1 or more")
        if not 0 <= self.sigma <= 4:
            raise ConfigError(f"a spread of {self.sigma} cannot be used: sigma of the log-normal must be 0 to 4")
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"lengths from {self.low} to {self.high} tokens are no range; give 1 <= low <= high")

    def draw(self, random: Random) -> int:
        """One length, in tokens."""
        length = round(random.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma))
        return min(max(length, self.low), self.high)


# Means of ShareGPT as the PagedAttention paper (arXiv 2309.06180, section 6.1) gives them; the spreads put some 7% of
# the prompts above 512 tokens and 5% of the answers above 1,024, where its figure 11 has tails of that order.
SHAREGPT_PROMPTS = LogNormalLengths(mean=161.31, sigma=1.2, low=4, high=2048)
SHAREGPT_OUTPUTS = LogNormalLengths(mean=337.99, sigma=0.9, low=1, high=2048)
