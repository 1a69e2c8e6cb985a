"""From `response_format` and `structured_outputs` of a request body to a constraint, and back to the field to blame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from aios_model.errors import InvalidRequestError
from aios_model.sampling.structured import StructuredOutputsParams

if TYPE_CHECKING:
    from aios_model.sampling.params import SamplingParams
    from aios_serve.openai_types import ResponseFormat, SamplingFields, StructuredOutputs

_OUR_SCHEMA = "structured_outputs.json"
_THEIR_SCHEMA = "response_format.json_schema.schema"


class ConstraintChecker(Protocol):
    """The part of an engine that is needed here."""

    async def check_structured_outputs(self, params: SamplingParams) -> None:
        """InvalidRequestError if the output cannot be given the form that `params` ask for."""
        ...


def structured_outputs_of(body: SamplingFields) -> StructuredOutputsParams | None:
    """What the output of a request must look like; None for anything.

    Raises:
        InvalidRequestError: both fields ask for something, or what they ask for is malformed; `param` names it.
    """
    asked, wanted = body.structured_outputs, body.response_format
    fields = {} if asked is None else _given(asked)
    if wanted is None or wanted.type == "text":
        return StructuredOutputsParams.of(fields) if fields else None
    if fields.keys() - {"disable_any_whitespace"}:
        raise InvalidRequestError(
            f"response_format asks for {wanted.type} and structured_outputs for "
            f"{' and '.join(sorted(fields))}; give one of them",
            param="structured_outputs",
        )
    try:
        return StructuredOutputsParams.of({**fields, **_constraint(wanted)})
    except InvalidRequestError as error:
        raise _as_asked(error) from None


async def check_structured_outputs(engine: ConstraintChecker, params: SamplingParams, body: SamplingFields) -> None:
    """Have the constraint of a request compiled, if it has one.

    Raises:
        InvalidRequestError: it cannot be honoured; `param` names the field of `body` that asks for it.
        QueueFullError: too many wait for the same.
    """
    try:
        await engine.check_structured_outputs(params)
    except InvalidRequestError as error:
        raise (error if body.response_format is None else _as_asked(error)) from None


def _given(asked: StructuredOutputs) -> dict[str, object]:
    return {name: value for name, value in asked.model_dump(by_alias=True).items() if value is not None}


def _constraint(wanted: ResponseFormat) -> dict[str, object]:
    if wanted.type == "json_object":
        return {"json_object": True}
    assert wanted.json_schema is not None, "checked where the body is"
    return {"json": wanted.json_schema.schema_}


def _as_asked(error: InvalidRequestError) -> InvalidRequestError:
    """The error with the name that the client knows its schema by."""
    if error.param != _OUR_SCHEMA:
        return error
    return InvalidRequestError(str(error).replace(_OUR_SCHEMA, _THEIR_SCHEMA, 1), param=_THEIR_SCHEMA)
