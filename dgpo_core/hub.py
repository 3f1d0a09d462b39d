"""Tell failures on the way to the Hugging Face hub apart from what is not there or not allowed."""

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dgpo_core.errors import InfrastructureError, UserError, first_line

# of the HTTP library that this version of huggingface_hub uses
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def load_error(what: str, error: Exception) -> InfrastructureError | UserError:
    """Return the error to raise where `what` ("x: cannot load a model") has failed by `error`."""
    text = f"{what}: {first_line(error)}"
    return InfrastructureError(text) if unreachable(error) else UserError(text)


def unreachable(error: BaseException) -> bool:
    """Return whether `error`, or its cause, is a connection that failed or a fault of the hub's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError | ConnectionError):
            return True
        if isinstance(cause, HfHubHTTPError):  # the hub has answered
            return cause.response is not None and cause.response.status_code >= 500
        if isinstance(cause, HTTP_ERROR):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False
