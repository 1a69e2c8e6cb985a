"""From bytes on the wire to a checked request: size, content type, JSON, refused fields, pydantic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from pydantic import BaseModel

from aios_serve.error_responses import ApiError
from aios_serve.refusals import refuse_unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from aios_serve.refusals import Refusal

Body = TypeVar("Body", bound=BaseModel)


class LimitBody:
    """ASGI middleware: no request body may be larger than `max_bytes`.

    A declared length is refused before a byte is read, an undeclared one while it is read: memory stays bounded.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a `receive` that counts."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _declared_length(scope) > self.max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> ApiError:
        message = f"The request body is larger than {self.max_bytes} bytes, the most this server accepts."
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


async def parse_body(request: Request, kind: type[Body], refusals: Mapping[str, Refusal] | None = None) -> Body:
    """Read a JSON object and check it as `kind`.

    Raises:
        ApiError: not JSON, or not an object.
        UnsupportedFieldError: it asks for something in `refusals`.
        pydantic.ValidationError: a field has a wrong type or is out of range.
    """
    fields = await read_json_object(request)
    refuse_unsupported(fields, refusals or {})
    return kind.model_validate(fields)


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body of `request` as a JSON object.

    Raises:
        ApiError: 400 for another content type, malformed or too deeply nested JSON, NaN, bad UTF-8, or no object.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise _bad_body(f"Content-Type must be application/json, not {content_type[:80]!r}")
    try:
        value = msgspec.json.decode(await request.body())
    except UnicodeDecodeError:
        raise _bad_body("the body is not valid UTF-8") from None
    except RecursionError:
        raise _bad_body("the JSON of the body is nested too deeply") from None
    except msgspec.MsgspecError as error:
        raise _bad_body(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _bad_body("the body must be a JSON object")
    return value


def _bad_body(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_body")


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
