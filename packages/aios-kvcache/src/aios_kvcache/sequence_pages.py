"""What the block manager knows of one sequence."""

from __future__ import annotations

from aios_kvcache.tier_level import StoredPage


class SequencePages:
    """One sequence's pages.

    Attributes:
        sequence_id: Its name.
        table: Page ids in the order of the tokens.
        salt: Only sequences of equal salt share pages.
        num_published: Leading pages that are published; their contents form one chain.
        num_found: Tokens that were in the pool when it started.
        num_queried: Tokens with which it was opened, until its admission has been counted.
        awaited: Pages of a tier that continue the published ones, until `reserve` plans their way back.
        num_awaited_tokens: Tokens in those, when it was opened.
    """

    __slots__ = (
        "awaited",
        "num_awaited_tokens",
        "num_found",
        "num_published",
        "num_queried",
        "salt",
        "sequence_id",
        "table",
    )

    def __init__(self, sequence_id: str, salt: str, *, num_queried: int) -> None:
        self.sequence_id = sequence_id
        self.table: list[int] = []
        self.salt = salt
        self.num_published = 0
        self.num_found = 0
        self.num_queried = num_queried
        self.awaited: list[StoredPage] = []
        self.num_awaited_tokens = 0
