"""The one tree of errors a caller can meet, free of any dialect. Dialects turn them into envelopes.

A message says what was wrong, which field or setting, and what to do.
"""

from __future__ import annotations


class CallError(Exception):
    """A request that ends without an answer of a model.

    `status` is the HTTP status before the first byte; after it the same error becomes the dialect's error event.
    `code` is a stable word for programs, `param` the field at fault, `retry_after_s` when trying again can help.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else type(self).code
        self.retry_after_s = retry_after_s
        if status is not None:
            self.status = status


class InvalidRequest(CallError):
    """400: the request cannot mean anything."""

    status = 400
    type = "invalid_request_error"


class Unauthenticated(CallError):
    """401: no key, or one we do not know."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(CallError):
    """403: a known key that may not do this."""

    status = 403
    type = "permission_error"


class NotFound(CallError):
    """404: no such path or model."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(CallError):
    """405, with the methods that are allowed as the `Allow` header wants them."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimedOut(CallError):
    """408: the body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class TooLarge(CallError):
    """413: the body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(CallError):
    """415: the body is not JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class HeadersTooLarge(CallError):
    """431: the request line or the headers are over the limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class RateLimited(CallError):
    """429: over a limit of the caller's."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(CallError):
    """503: nobody can serve this now."""

    status = 503
    type = "server_error"
    code = "no_backend"


class UpstreamFailed(CallError):
    """502: the engine or provider broke, or our own key there is bad."""

    status = 502
    type = "server_error"
    code = "upstream_error"


class UpstreamTimedOut(CallError):
    """504: the engine or provider did not answer in time."""

    status = 504
    type = "server_error"
    code = "upstream_timeout"
