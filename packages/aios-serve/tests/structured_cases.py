"""Random JSON schemas with everything that models are commonly asked for, and texts of other constraints.

Used by the tests here and by `benchmarks/structured.py`.
"""

from __future__ import annotations

from random import Random
from typing import Any

_WORDS = ("name", "age", "city", "tags", "price", "is_open", "größe", "x-id", "kind", "notes", "a b", 'qu"ote')
_PATTERNS = ("^[a-z]{2,5}$", "^[0-9]{4}-[0-9]{2}$", "^(red|green|blue)$", "^[A-Z][a-z]+$", "^\\d{3}$", "^a+b?$")


def random_schema(random: Random, *, depth: int = 2) -> dict[str, Any]:
    """An object of a few properties, up to `depth` levels of objects and arrays below it."""
    names = random.sample(_WORDS, random.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _random_value(random, depth) for name in names},
        "required": [name for name in names if random.random() < 0.7],
        "additionalProperties": False,
    }
    if random.random() < 0.2:
        schema["title"] = "Something"
    return schema


def _random_value(random: Random, depth: int) -> dict[str, Any]:
    makers = [_string, _string, _pattern, _integer, _number, _boolean, _enum, _const, _nullable]
    if depth > 0:
        makers += [_array, _array, lambda random: random_schema(random, depth=depth - 1), _any_of]
    maker = random.choice(makers)
    return maker(random, depth) if maker in (_array, _any_of) else maker(random)  # type: ignore[call-arg]


def _string(random: Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "maxLength": random.randint(3, 20)}
    if random.random() < 0.3:
        schema["minLength"] = random.randint(1, 3)
    return schema


def _pattern(random: Random) -> dict[str, Any]:
    return {"type": "string", "pattern": random.choice(_PATTERNS), "maxLength": 12}


def _integer(random: Random) -> dict[str, Any]:
    low = random.randint(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + random.randint(0, 5000)}
    return {"type": "integer", **bounds, **({"multipleOf": 1} if random.random() < 0.1 else {})}


def _number(random: Random) -> dict[str, Any]:
    low = round(random.uniform(-10, 10), random.randint(0, 3))
    return {"type": "number", "minimum": low, "maximum": round(low + random.uniform(0.5, 100), 2)}


def _boolean(random: Random) -> dict[str, Any]:
    return {"type": "boolean"}


def _enum(random: Random) -> dict[str, Any]:
    return {"enum": random.sample(["red", "green", "", 3, -1.5, True, None, "日本", "a\nb"], random.randint(1, 4))}


def _const(random: Random) -> dict[str, Any]:
    return {"const": random.choice(["fixed", 7, False, None, ["a", 1], {"k": "v"}])}


def _nullable(random: Random) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": 0, "maximum": 99}


def _array(random: Random, depth: int) -> dict[str, Any]:
    low = random.randint(0, 2)
    return {
        "type": "array",
        "items": _random_value(random, depth - 1),
        "minItems": low,
        "maxItems": low + random.randint(0, 3),
    }


def _any_of(random: Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_random_value(random, depth - 1) for _ in range(random.randint(1, 3))]}
