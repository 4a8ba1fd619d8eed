"""Errors as the API of OpenAI states them."""

from __future__ import annotations

from typing import Any

from delethink.errors import DelethinkError, QueryTooLongError, UserError, WorkersLostError
from delethink.output import safe_text

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(DelethinkError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field at fault.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the body of the response; its ``code`` is the status where there is no word."""
        return {
            "error": {
                "message": safe_text(str(self), lines=False),
                "type": _TYPES.get(self.status, "internal_error"),
                "param": self.param,
                "code": self.code or self.status,
            }
        }


def as_api_error(error: BaseException) -> ApiError:
    """Return the answer to a request that failed with any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueryTooLongError):
        return ApiError(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, WorkersLostError):
        return ApiError(503, str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the request took too long")
    if isinstance(error, DelethinkError):
        return ApiError(502, f"the engine failed: {error}", code="engine_error")
    return ApiError(500, f"the server failed: {type(error).__name__}")
