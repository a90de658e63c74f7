"""What is wrong with a request, as a status and one sentence in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from omni.console import log

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_SHOWN = 60  # characters of what was found


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the key that is meant.
        code: a name that programs can look for.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """As the API says it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As the whole answer to a request."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            # a browser then asks for the token as a password, and the page can be used as well
            headers["WWW-Authenticate"] = 'Basic realm="omni", charset="UTF-8"'
        return JSONResponse(self.body(), self.status, headers)


def server_error(error: BaseException) -> ApiError:
    """What a client hears of a fault of ours; the log has the rest."""
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request and goes on with the next", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Give every error of the app this form."""

    @app.exception_handler(ApiError)
    async def _ours(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:_SHOWN]
        known = {404: f"{path}: no such address", 405: f"{request.method} {path}: not the method of this address"}
        return ApiError(error.status_code, known.get(error.status_code, str(error.detail))).response()

    @app.exception_handler(Exception)
    async def _fault(_: Request, error: Exception) -> JSONResponse:
        return server_error(error).response()


def validation_error(problems: Any) -> ApiError:
    """The first of the problems that pydantic found, and how many more there are."""
    first, more = problems[0], len(problems) - 1
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    if first["type"] == "extra_forbidden":
        message = f"{where}: this server does not know this key"
    elif first["type"] == "missing":
        message = f"{where}: missing"
    else:
        said = first["msg"].removeprefix("Value error, ")
        message = f"{where}: {said[:1].lower()}{said[1:]}"
        if first["type"] != "value_error":
            message += f", found {_shown(first['input'])}"
    return ApiError(400, message + (f" (and {more} more)" if more else ""), where)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
