"""The error tree. Owns every exception Headrace raises at a caller; knows nothing else.

    HeadraceError
    +-- ConfigError                 the engine cannot be built as asked (names the setting)
    |   +-- UnsupportedModelError   an architecture or feature of the checkpoint is not implemented
    +-- CheckpointError             a weight file is missing, corrupt, or has a wrong tensor
    +-- RequestError                a request is malformed (names the field)          400
    |   +-- RequestTooLargeError    a body or list over its bound                     413
    |   +-- NotFoundError           a named thing does not exist                      404
    +-- WeightUpdateError           a weight update was refused; nothing was written  400
    |   +-- UpdateConflictError     a command in a state that does not allow it       409, retryable
    +-- UnavailableError            the engine cannot serve this now                  503
    |   +-- PoisonedError           live weights are a mix until a full update lands  503
    |   +-- NeedsWeightsError       no current weights until a full update lands    503, retryable
    |   +-- PauseTimeoutError       queued behind a pause longer than pause_timeout   503, retryable
    |   +-- EngineDeadError         the core died; the request may be retried         503, retryable
    |   |   +-- DeviceLostError     its device executes nothing any more              503, retryable
    |   +-- ShutdownError           the engine is shutting down                       503, retryable
    |   +-- UnreachableError        a client got no answer from its server            503, retryable
    +-- DeadlineError               a wait outlived its deadline                      504, retryable
    +-- NonFiniteError              the model computed NaN or infinity for a request  500
    +-- InternalError               our own bug, reported and not hidden              500

An error crosses a process boundary as an `ErrorInfo` and is raised again on the other side with the same class.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


def encodable(text: str) -> str:
    """The same text where UTF-8 can encode it; lone surrogates, as in names of files, are written out as \\udXXX."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An error as a value: `code` is the class name in the tree above, `field` the offending input or ""."""

    code: str
    message: str
    field: str = ""

    @property
    def status(self) -> int:
        return _BY_CODE.get(self.code, InternalError).status

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed on another replica or later."""
        return _BY_CODE.get(self.code, InternalError).retryable

    def to_exception(self) -> HeadraceError:
        return _BY_CODE.get(self.code, InternalError)(self.message, field=self.field)


class HeadraceError(Exception):
    """Base of all errors raised by Headrace. `field` names the offending input ("" when there is none).

    Whatever text went into them, `message` and `field` can be sent: an answer must not fail for what it quotes.
    """

    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str = "") -> None:
        self.message = encodable(message)
        self.field = encodable(field)
        super().__init__(self.message)

    def info(self) -> ErrorInfo:
        """This error as a value that can be sent to another process; of a class outside the tree as its nearest one."""
        code = next(kind.__name__ for kind in type(self).__mro__ if _BY_CODE.get(kind.__name__) is kind)
        return ErrorInfo(code, self.message, self.field)


class ConfigError(HeadraceError):
    status = 400


class UnsupportedModelError(ConfigError):
    pass


class CheckpointError(HeadraceError):
    status = 400


class RequestError(HeadraceError, ValueError):
    status = 400


class RequestTooLargeError(RequestError):
    status = 413


class NotFoundError(RequestError):
    status = 404


class WeightUpdateError(HeadraceError):
    status = 400


class UpdateConflictError(WeightUpdateError):
    status = 409
    retryable = True


class UnavailableError(HeadraceError):
    status = 503


class PoisonedError(UnavailableError):
    pass


class NeedsWeightsError(UnavailableError):
    retryable = True


class PauseTimeoutError(UnavailableError):
    retryable = True


class EngineDeadError(UnavailableError):
    retryable = True


class DeviceLostError(EngineDeadError):
    pass


class ShutdownError(UnavailableError):
    retryable = True


class UnreachableError(UnavailableError):
    retryable = True


class DeadlineError(HeadraceError):
    status = 504
    retryable = True


class NonFiniteError(HeadraceError):
    pass


class InternalError(HeadraceError):
    pass


def _tree(root: type[HeadraceError]) -> dict[str, type[HeadraceError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE: dict[str, type[HeadraceError]] = _tree(HeadraceError)
