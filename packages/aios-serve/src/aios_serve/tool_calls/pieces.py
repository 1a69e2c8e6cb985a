"""What an answer is made of once it has been taken apart: text, thoughts, and calls of functions piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins: which function. Calls of one answer are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next characters of a call's arguments, which together are JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call has ended.

    Attributes:
        index: Which.
        complete: Whether its arguments are a whole JSON object. If not, the text ended before or went wrong in them.
        raw: The call as the model wrote it, where it is not complete; empty where it is.
    """

    index: int
    complete: bool
    raw: str = ""


CallPiece = Text | CallStart | CallArguments | CallEnd
Piece = CallPiece | Reasoning


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind joined, and empty ones left out."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        match piece, last:
            case ((Text(text="") | Reasoning(text="") | CallArguments(text="")), _):
                pass
            case Text(text=text), Text(text=before):
                result[-1] = Text(before + text)
            case Reasoning(text=text), Reasoning(text=before):
                result[-1] = Reasoning(before + text)
            case CallArguments(index=index, text=text), CallArguments(index=same, text=before) if index == same:
                result[-1] = CallArguments(index, before + text)
            case _:
                result.append(piece)
    return result
