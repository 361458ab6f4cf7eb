"""An error keeps its class, field and status across a process boundary."""

import msgspec
import pytest

from headrace.types import errors
from headrace.types.errors import ErrorInfo, HeadraceError


def all_errors() -> list[type[HeadraceError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, HeadraceError)]


@pytest.mark.parametrize("cls", all_errors())
def test_round_trip(cls: type[HeadraceError]) -> None:
    sent = msgspec.msgpack.encode(cls("what went wrong", field="some.field").info())
    received = msgspec.msgpack.decode(sent, type=ErrorInfo).to_exception()
    assert type(received) is cls
    assert (str(received), received.field, received.status) == ("what went wrong", "some.field", cls.status)


def test_an_unknown_code_is_an_internal_error() -> None:
    assert type(ErrorInfo("NoSuchError", "x").to_exception()) is errors.InternalError


def test_only_unavailability_and_deadlines_are_retryable() -> None:
    assert {cls.__name__ for cls in all_errors() if cls.retryable} == {
        "PauseTimeoutError",
        "NeedsWeightsError",
        "EngineDeadError",
        "DeviceLostError",
        "ShutdownError",
        "UnreachableError",
        "DeadlineError",
        "UpdateConflictError",
    }


def test_a_class_outside_the_tree_is_sent_as_the_nearest_one_in_it() -> None:
    class OwnError(errors.RequestError):
        status = 415

    assert OwnError("no", field="body").info() == ErrorInfo("RequestError", "no", "body")


@pytest.mark.parametrize("text", ["plain", "grüße 🙂", "\ud800", "model-\udcff.bin", "a\ud83d", ""])
def test_an_error_can_be_sent_whatever_text_it_quotes(text: str) -> None:
    error = errors.CheckpointError(f"{text} is missing", field=text)
    info = error.info()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=ErrorInfo) == info
    assert msgspec.json.encode({"message": str(error), "param": error.field})
    assert info.to_exception().message == error.message
    assert error.field == text.encode("utf-8", "backslashreplace").decode()
