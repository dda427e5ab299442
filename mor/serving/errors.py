"""Answers other than 200.

Messages are bounded and bodies are made from values, so no input can break or blow up an error.
"""

from typing import Any, ClassVar

from mor.serving.requests import RequestError

__all__ = ["ApiError", "error_body"]

_MESSAGE = 500


class ApiError(Exception):
    """An answer other than 200, made into a body by `error_body`.

    Args:
        status: of HTTP.
        message: for a person; it is cut at 500 characters.
        type: OpenAI's class of the error; by default that of the status.
        param: the parameter at fault.
        code: for a program.
        retry_after: seconds after which to try again, for 429 and 503.
    """

    _TYPES: ClassVar[dict[int, str]] = {
        401: "authentication_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "server_error",
    }

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Bound the message."""
        if len(message) > _MESSAGE:
            message = message[:_MESSAGE] + "..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or self._TYPES.get(status, "invalid_request_error")
        self.param = param[:100] if param else None
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """The answer to an exception.

        Args:
            error: what was raised while a request was read or run.

        Returns:
            400 for a request that can never work; 500, without details, for anything else.
        """
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestError):
            return cls(400, str(error), param=error.option, code="invalid_value")
        return cls(500, f"internal error ({error.__class__.__name__})", code="internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error.

    Args:
        error: the error.

    Returns:
        OpenAI's `{"error": {message, type, param, code}}`.

    Example:
        >>> error_body(ApiError(404, "no such model", code="model_not_found"))["error"]["type"]
        'invalid_request_error'
    """
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
