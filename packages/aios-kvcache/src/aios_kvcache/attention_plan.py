"""What one step's batch means for attention: which slots to read, which keys each query sees.

Worked out once per step, in `PagedKVCache.bind`, and then used by every layer. Layers with different sliding windows
see different keys, so there is one plan per window.

Letters of shapes: B sequences, S keys, C tokens per page, W block-table width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from aios_kvcache.layout import NULL_BLOCK, num_blocks_for
from aios_model.transfers import upload, upload_tensor

Slots = slice | Tensor
"""Places in a pool, counted in tokens: a run of neighbours, which is read without copying, or int64 indices."""

QUERY_BLOCK = 256
"""Queries of a prompt that attend at once; no mask grows beyond [256, S]. Measured on 2 cores, 2,048 tokens of prompt,
9 heads of 64, float32: 38 ms in blocks of 256, 41 in blocks of 128, 49 in blocks of 512, 79 in one piece."""

TOLERATED_PADDING = 128
"""Padding, in keys, that costs less than one more call of the attention kernel."""


@dataclass(slots=True, kw_only=True)  # one per sequence and step: frozen, it takes twice as long to build
class SequenceSlice:
    """The next tokens of one sequence, and where its pages are.

    Attributes:
        start: Position of the first new token: so many tokens are in the pages already.
        length: New tokens, 1 or more. One is a decode (or a prompt of one token), more are a chunk of a prompt.
        block_table: Pages of the sequence, in the order of its tokens; they must have room for start + length tokens.
    """

    start: int
    length: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens in the pages once this step is done."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one new token each, attended in one call.

    Attributes:
        rows: Which of the batch's T tokens they are.
        slots: The keys to read, B * S of them; padding reads the null page.
        num_keys: S, keys per sequence.
        mask: [B, 1, 1, S], 0 or -inf, added to the scores; None if every query sees all of its S keys.
    """

    rows: Slots
    slots: Slots
    num_keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryBlock:
    """A few successive queries of a prompt.

    Attributes:
        rows: Which of the batch's T tokens they are.
        keys: Which of the chunk's keys they need.
        mask: [queries, keys], 0 or -inf, added to the scores; None if there is one query, which sees all of them.
    """

    rows: slice
    keys: slice
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Several new tokens of one sequence.

    Attributes:
        slots: Keys to read: of the chunk itself, and of the context before it as far as the window reaches.
        query_blocks: The chunk's tokens, a few at a time.
    """

    slots: Slots
    query_blocks: tuple[QueryBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How a batch is attended in the layers of one window."""

    decode_groups: tuple[DecodeGroup, ...]
    prefill_chunks: tuple[PrefillChunk, ...]


class AttentionPlanner:
    """Plans the layers that share a window.

    Args:
        block_size: Tokens per page.
        window: Sliding window in tokens; None if queries see all that is before them.
        max_group_keys: Keys that one group of decodes may read, B * S; a single sequence may exceed it.
        dtype: Of the masks: that of queries, keys and values.
        device: Where the plan is used.
    """

    def __init__(
        self, *, block_size: int, window: int | None, max_group_keys: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._window = window
        self._max_group_keys = max_group_keys
        self._dtype = dtype
        self._device = device
        self._causal_mask = CausalMask(window=window, dtype=dtype, device=device)

    def plan(self, batch: Sequence[SequenceSlice]) -> AttentionPlan:
        """Plans one step; the batch's tokens are packed in the order of its sequences."""
        decodes: list[tuple[int, SequenceSlice]] = []
        chunks: list[PrefillChunk] = []
        row = 0
        for piece in batch:
            if piece.length == 1:
                decodes.append((row, piece))
            else:
                chunks.append(self._plan_chunk(row, piece))
            row += piece.length
        visible = [self._num_visible(piece.end) for _, piece in decodes]
        groups = group_by_length(visible, max_keys=self._max_group_keys)
        return AttentionPlan(
            decode_groups=tuple(self._plan_group([decodes[i] for i in group]) for group in groups),
            prefill_chunks=tuple(chunks),
        )

    def _num_visible(self, num_tokens: int) -> int:
        return num_tokens if self._window is None else min(num_tokens, self._window)

    def _plan_group(self, decodes: list[tuple[int, SequenceSlice]]) -> DecodeGroup:
        rows = _as_slots([row for row, _ in decodes], device=self._device)
        if len(decodes) == 1:
            piece = decodes[0][1]
            num_keys = self._num_visible(piece.end)
            slots = self._slots_between(piece.block_table, piece.end - num_keys, piece.end)
            return DecodeGroup(rows=rows, slots=slots, num_keys=num_keys, mask=None)
        size = self._block_size
        firsts = [piece.end - self._num_visible(piece.end) for _, piece in decodes]
        # Read from the border of the page in which the window begins; what is before the window is masked.
        pages = [
            list(piece.block_table[first // size : num_blocks_for(piece.end, size)])
            for first, (_, piece) in zip(firsts, decodes, strict=True)
        ]
        begins_B1 = torch.tensor([first % size for first in firsts])[:, None]
        ends_B1 = torch.tensor([p.end - f // size * size for f, (_, p) in zip(firsts, decodes, strict=True)])[:, None]
        num_keys = int(ends_B1.max())
        width = max(map(len, pages))
        table_BW = torch.tensor([table + [NULL_BLOCK] * (width - len(table)) for table in pages])
        slots_BS = _slots_of_pages(table_BW, size)[:, :num_keys]
        keys_S = torch.arange(num_keys)
        visible_BS = (keys_S >= begins_B1) & (keys_S < ends_B1)
        # What is masked may be leftovers, and 0 * NaN is NaN: read zeros from the null page instead.
        slots_BS = torch.where(visible_BS, slots_BS, NULL_BLOCK * size)
        mask_BS = torch.zeros(visible_BS.shape, dtype=self._dtype).masked_fill_(~visible_BS, float("-inf"))
        return DecodeGroup(
            rows=rows,
            slots=upload_tensor(slots_BS.flatten(), self._device),
            num_keys=num_keys,
            mask=None if bool(visible_BS.all()) else upload_tensor(mask_BS[:, None, None], self._device),
        )

    def _plan_chunk(self, row: int, piece: SequenceSlice) -> PrefillChunk:
        first_key = self._first_visible(piece.start)
        blocks = []
        for begin in range(piece.start, piece.end, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, piece.end)
            first = self._first_visible(begin)
            blocks.append(
                QueryBlock(
                    rows=slice(row + begin - piece.start, row + end - piece.start),
                    keys=slice(first - first_key, end - first_key),
                    mask=None if end - begin == 1 else self._causal_mask.corner(end - begin, end - first),
                )
            )
        slots = self._slots_between(piece.block_table, first_key, piece.end)
        return PrefillChunk(slots=slots, query_blocks=tuple(blocks))

    def _first_visible(self, position: int) -> int:
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _slots_between(self, block_table: Sequence[int], begin: int, end: int) -> Slots:
        """Slots of the tokens at positions [begin, end) of one sequence."""
        size = self._block_size
        pages = block_table[begin // size : num_blocks_for(end, size)]
        offset = begin % size
        if _is_run(pages):
            base = pages[0] * size + offset
            return slice(base, base + end - begin)
        slots = _slots_of_pages(torch.tensor([pages]), size)[0, offset : offset + end - begin]
        return upload_tensor(slots, self._device)


class CausalMask:
    """One mask for all blocks of queries, however long their context.

    Whether a query sees a key depends on their distance only. So the mask of n queries over s keys, the last query
    standing at the last key, is always the lower right corner of the mask of more queries over more keys.

    Args:
        window: Sliding window in tokens, or None.
        dtype: Of the queries.
        device: Where it is used.
    """

    def __init__(self, *, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self._window = window
        self._mask = torch.empty(QUERY_BLOCK, 0, dtype=dtype, device=device)

    def corner(self, num_queries: int, num_keys: int) -> Tensor:
        """[num_queries, num_keys]: 0 where query sees key, else -inf."""
        if num_keys > self._mask.shape[1]:
            self._mask = self._build(1 << (num_keys - 1).bit_length())
        num_rows, num_columns = self._mask.shape
        return self._mask[num_rows - num_queries :, num_columns - num_keys :]

    def _build(self, num_columns: int) -> Tensor:
        num_rows, device = self._mask.shape[0], self._mask.device
        # Both count from the lower right corner, upwards and to the left.
        query_R1 = torch.arange(num_rows - 1, -1, -1, device=device)[:, None]
        key_S = torch.arange(num_columns - 1, -1, -1, device=device)
        hidden_RS = key_S < query_R1
        if self._window is not None:
            hidden_RS |= key_S - query_R1 >= self._window
        return torch.zeros_like(hidden_RS, dtype=self._mask.dtype).masked_fill_(hidden_RS, float("-inf"))


def group_by_length(lengths: Sequence[int], *, max_keys: int) -> list[list[int]]:
    """Sorts sequences into groups that can be padded to one length without much waste.

    Nobody is padded to more than twice its length, except where that costs less than another group.

    Args:
        lengths: Keys that each sequence reads.
        max_keys: Keys that a group of several sequences may read, padding included.

    Returns:
        Groups of indices into `lengths`, each in ascending order.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        wasteful = 2 * length < longest and longest - length > TOLERATED_PADDING
        if not groups or wasteful or (len(groups[-1]) + 1) * longest > max_keys:
            groups.append([])
            longest = length
        groups[-1].append(index)
    return [sorted(group) for group in groups]


def write_slots(batch: Sequence[SequenceSlice], *, block_size: int, device: torch.device) -> Slots:
    """Where each of the batch's T new tokens goes, in the order in which they are packed."""
    slots: list[int] = []
    for piece in batch:
        for index in range(piece.start // block_size, num_blocks_for(piece.end, block_size)):
            base = piece.block_table[index] * block_size
            begin = max(piece.start - index * block_size, 0)
            slots.extend(range(base + begin, base + min(piece.end - index * block_size, block_size)))
    return _as_slots(slots, device=device)


def _slots_of_pages(table_BW: Tensor, block_size: int) -> Tensor:
    """[B, W] pages -> [B, W * C] slots."""
    return (table_BW[:, :, None] * block_size + torch.arange(block_size)).flatten(1)


def _as_slots(indices: list[int], *, device: torch.device) -> Slots:
    if indices and _is_run(indices):
        return slice(indices[0], indices[-1] + 1)
    return upload(indices, dtype=torch.int64, device=device)


def _is_run(numbers: Sequence[int]) -> bool:
    """Whether each number is one more than the one before it."""
    return numbers[-1] - numbers[0] == len(numbers) - 1 and all(b - a == 1 for a, b in pairwise(numbers))
