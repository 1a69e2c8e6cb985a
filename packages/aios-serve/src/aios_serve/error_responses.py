"""Every error a client can see, in one shape: `{"error": {"message", "type", "param", "code"}}`.

`to_api_error` is the one table from exceptions to answers; it serves plain answers and errors inside a stream alike.
The words in `type` and `code` are OpenAI's, so that code written against `openai.BadRequestError.code` keeps working.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from aios_model.errors import AiosError, ChatTemplateError, InvalidRequestError
from aios_sched.errors import QueueFullError
from aios_serve.errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineLoadingError,
    EngineRestartingError,
    EngineUnavailableError,
)
from aios_serve.openai_responses import ErrorBody, ErrorReply
from aios_serve.refusals import UnsupportedFieldError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An error of the HTTP layer itself, ready to be sent.

    Attributes:
        status: HTTP status.
        message: For people; says what was wrong and what to do.
        type: Class of error, as "invalid_request_error".
        code: For programs, as "model_not_found".
        param: The field to blame, if one is.
        headers: Extra headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON of the answer."""
        error = ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorReply(error=error))

    def response(self) -> Response:
        """The answer."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


class ClientDisconnectedError(Exception):
    """The client went away; nobody is left to answer."""


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app`, its router's own included, answer in the one shape."""

    async def answer(_request: Request, exception: Exception) -> Response:
        return to_api_error(exception).response()

    async def answer_nobody(_request: Request, _exception: Exception) -> Response:
        return Response(status_code=499)

    for kind in (ApiError, AiosError, ValidationError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnectedError, answer_nobody)


class LastResort:
    """ASGI middleware: what no handler expected is logged in full and answered with 500 and no detail."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; answer if that raises before an answer has begun."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as exception:
            if scope["type"] != "http":
                raise
            if started:  # too late for an answer: dropping the connection is how HTTP says so
                raise
            await to_api_error(exception).response()(scope, receive, send)


def to_api_error(exception: Exception) -> ApiError:
    """What a client is told about `exception`. Unexpected ones are logged here and told nothing."""
    match exception:
        case ApiError():
            return exception
        case UnsupportedFieldError():
            return ApiError(400, str(exception), code="unsupported_parameter", param=exception.param)
        case InvalidRequestError():
            return ApiError(400, str(exception), code="invalid_value", param=exception.param)
        case ChatTemplateError():
            return ApiError(400, str(exception), code="chat_template_error", param="messages")
        case ValidationError() | RequestValidationError():
            return _validation_error(exception)
        case EngineUnavailableError() | QueueFullError():
            return _unavailable(exception)
        case HTTPException():
            return _router_error(exception)
        case _:
            logger.error("unexpected error while answering a request", exc_info=exception)
            message = "The server failed while answering this request; its log says why."
            return ApiError(500, message, type="server_error", code="internal_error")


def _validation_error(exception: ValidationError | RequestValidationError) -> ApiError:
    """The first few things pydantic found, as one sentence each."""
    if isinstance(exception, ValidationError):
        found = exception.errors(include_url=False, include_context=False)
    else:
        found = list(exception.errors())
    lines = []
    for error in found[:3]:
        where = ".".join(str(part) for part in error["loc"])
        what = error["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}" if where else what)
    if len(found) > 3:
        lines.append(f"and {len(found) - 3} more")
    missing = found[0]["type"] == "missing"
    param = ".".join(str(part) for part in found[0]["loc"]) or None
    code = "missing_required_parameter" if missing else "invalid_value"
    return ApiError(400, "; ".join(lines), code=code, param=param)


def _unavailable(exception: AiosError) -> ApiError:
    """503 in five flavours: a full queue empties within a second or so, loading takes longer, the dead stay dead."""
    message = str(exception)
    match exception:
        case QueueFullError():
            code, retry_after = "queue_full", 1
        case EngineLoadingError():
            code, retry_after = "engine_loading", 2
        case EngineDrainingError():
            code, retry_after = "engine_draining", 5
        # The reasons of the next two may name files of this machine: they are for the log, which has them.
        case EngineRestartingError():
            code, retry_after = "engine_restarting", 5
            message = "The engine stopped and is being started again; the server's log says why. Try again in a moment."
        case EngineDeadError():
            code, retry_after = "engine_dead", 30
            message = "The engine has stopped and takes no requests; the server's log says why. Restart the server."
        case _:
            code, retry_after = "engine_unavailable", 5
    headers = {"Retry-After": str(retry_after)}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


def _router_error(exception: HTTPException) -> ApiError:
    """Unknown routes and methods, and what Starlette itself refuses."""
    code = _HTTP_CODES.get(exception.status_code)
    kind = "invalid_request_error" if exception.status_code < 500 else "server_error"
    return ApiError(exception.status_code, str(exception.detail), type=kind, code=code, headers=exception.headers)
