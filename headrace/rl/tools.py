"""Tools that conversations call. Owns how one is described to the model, how its arguments are checked and how it is
run: Python callables, and tools of verl's `BaseTool` protocol, known by their methods. Knows no engine and no tokens.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import re
import threading
import time
import typing
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from headrace.text import ToolCall, normalize_tools
from headrace.types.errors import ConfigError, DeadlineError, HeadraceError, RequestError, encodable

Fault = Literal["", "invalid", "failed", "late"]

_VERL_METHODS = ("create", "execute", "calc_reward", "release")
_ARGUMENTS = re.compile(r"^(?:Args|Arguments|Parameters):\s*$", re.MULTILINE)
_NEXT_SECTION = re.compile(r"^\S", re.MULTILINE)
_ARGUMENT = re.compile(r"^\s+(\w+)(?:\s*\([^)]*\))?:\s*(\S.*)$", re.MULTILINE)


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a tool and what the model was told.

    name, arguments  as the model wrote them; both "" where it wrote none that can be read
    content          the tool message's content
    fault            "": the tool answered; "invalid": it was never run; "failed": it raised; "late": it took too long
    seconds, reward  how long it ran, and what a tool of verl's gave for this call
    """

    name: str
    arguments: str
    content: str
    fault: Fault = ""
    seconds: float = 0.0
    reward: float = 0.0


class RunnableTool(Protocol):
    """One tool, whatever it is made of. An instance is what a conversation has of it, from its first call on."""

    name: str
    schema: dict[str, Any]

    async def open(self, arguments: Mapping[str, Any]) -> Any: ...

    async def call(self, instance: Any, values: dict[str, Any], arguments: Mapping[str, Any]) -> tuple[Any, float]: ...

    async def close(self, instance: Any, arguments: Mapping[str, Any]) -> float | None: ...


class FunctionTool:
    """A Python callable. One that is no coroutine function runs in a thread of its own, which nothing can stop: a call
    that is late is answered so, and its thread is left behind.

    name    None: that of the function
    schema  an OpenAI tool, or its `parameters`; None: made from the signature, whose types arguments must then have.
            The description is the docstring's text before `Args:`, that of a parameter its line there
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, schema: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(function):
            raise ConfigError(f"tools: {type(function).__name__} is neither callable nor a tool", field="tools")
        self._function = function
        self.name = name or getattr(function, "__name__", "") or type(function).__name__
        self._signature = inspect.signature(function)
        self._arguments = None if schema is not None else _arguments_of(function, self.name, self._signature)
        self.schema = _whole_schema(self.name, function, schema, self._arguments)

    async def open(self, arguments: Mapping[str, Any]) -> None:
        return None

    async def call(self, instance: None, values: dict[str, Any], arguments: Mapping[str, Any]) -> tuple[Any, float]:
        named = self._checked(values)
        if inspect.iscoroutinefunction(self._function):
            return await self._function(**named), 0.0
        found = await _in_thread(lambda: self._function(**named))
        return (await found if inspect.isawaitable(found) else found), 0.0

    async def close(self, instance: None, arguments: Mapping[str, Any]) -> None:
        return None

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        if self._arguments is None:
            try:
                self._signature.bind(**values)
            except TypeError as error:
                raise _InvalidCall(str(error)) from None
            return values
        try:
            found = msgspec.convert(values, self._arguments)
        except msgspec.ValidationError as error:
            raise _InvalidCall(str(error)) from None
        return {name: getattr(found, name) for name in values}


class VerlTool:
    """A tool with the methods of verl's `BaseTool`. A conversation has one instance of it: created at its first call,
    asked for its reward and released at the conversation's end. `tools_kwargs` of the conversation has under the tool's
    name `create_kwargs` (handed on under this name, as verl does), `execute_kwargs`, `calc_reward_kwargs` and
    `release_kwargs`."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool
        schema = getattr(tool, "tool_schema", None) or tool.get_openai_tool_schema()
        dump = getattr(schema, "model_dump", None)
        self.schema = _checked_schema(dump(exclude_unset=True, exclude_none=True) if dump else schema)
        self.name = str(self.schema["function"]["name"])

    async def open(self, arguments: Mapping[str, Any]) -> Any:
        found = await self._tool.create(create_kwargs=arguments.get("create_kwargs", {}))
        return found[0] if isinstance(found, tuple) else found

    async def call(self, instance: Any, values: dict[str, Any], arguments: Mapping[str, Any]) -> tuple[Any, float]:
        response, reward, _ = await self._tool.execute(instance, values, **arguments.get("execute_kwargs", {}))
        text = response.get("text") if isinstance(response, Mapping) else getattr(response, "text", response)
        return "" if text is None else text, _finite(reward or 0.0)

    async def close(self, instance: Any, arguments: Mapping[str, Any]) -> float:
        try:
            return _finite(await self._tool.calc_reward(instance, **arguments.get("calc_reward_kwargs", {})))
        finally:
            await self._tool.release(instance, **arguments.get("release_kwargs", {}))


class ToolBox:
    """The tools of a loop, by name. Raises `ConfigError` (field "tools") for what is none, and for two of one name."""

    def __init__(self, tools: Iterable[Any]) -> None:
        self._tools: dict[str, RunnableTool] = {}
        for given in tools:
            tool = _tool_of(given)
            if tool.name in self._tools:
                raise ConfigError(f"tools: two are named {tool.name!r}", field="tools")
            self._tools[tool.name] = tool

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    def named(self, name: str) -> RunnableTool:
        return self._tools[name]

    def refusal(self) -> CallRecord:
        """What the model is told of a call that cannot be read."""
        names = ", ".join(self._tools)
        content = f"Error: this call cannot be read. It must be JSON with a name, one of {names}, and its arguments."
        return CallRecord(name="", arguments="", content=content, fault="invalid")


class ToolUse:
    """One conversation's use of the tools: its instances, from the first call of each to `close`."""

    def __init__(self, box: ToolBox, tools_kwargs: Mapping[str, Mapping[str, Any]]) -> None:
        self._box = box
        self._kwargs = tools_kwargs
        self._instances: dict[str, asyncio.Future[Any]] = {}

    async def answer(self, call: ToolCall, seconds: float, max_characters: int) -> CallRecord:
        """Run a call. Whatever becomes of it, the model gets an answer."""
        started = time.monotonic()
        task = asyncio.ensure_future(self._run(call))
        try:
            await asyncio.wait({task}, timeout=seconds)
            fault, text, reward = _outcome(task, f"Error: {call.name} did not answer within {seconds:g} s")
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(_forget)
        if len(text) > max_characters:
            text = f"{text[:max_characters]}... ({len(text) - max_characters} more characters)"
        return CallRecord(
            name=call.name,
            arguments=call.arguments,
            content=encodable(text),
            fault=fault,
            seconds=time.monotonic() - started,
            reward=reward,
        )

    async def close(self, seconds: float) -> tuple[dict[str, float], HeadraceError | None]:
        """Release the instances, each within `seconds`. Returns the reward of each that gives one, and what kept the
        first of those that could not be released, or asked."""
        opened, self._instances = self._instances, {}
        ends = await asyncio.gather(*(self._close(name, opening, seconds) for name, opening in opened.items()))
        rewards = {name: end for name, end in zip(opened, ends, strict=True) if isinstance(end, float)}
        return rewards, next((end for end in ends if isinstance(end, HeadraceError)), None)

    async def _close(self, name: str, opening: asyncio.Future[Any], seconds: float) -> float | HeadraceError | None:
        if not opening.done():
            opening.cancel()  # nobody waits for it any more
            return None
        if _has_failed(opening):
            return None
        work = self._box.named(name).close(opening.result(), self._of(name))
        task: asyncio.Future[float | None] = asyncio.ensure_future(_guarded(work))
        try:
            await asyncio.wait({task}, timeout=seconds)
            if not task.done():
                return DeadlineError(f"tool {name} was not released within {seconds:g} s", field="tool_timeout")
            error = task.exception()
            if error is not None:
                return RequestError(f"tool {name} at the end of its conversation: {_said(error)}", field="tools")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                task.add_done_callback(_forget)

    async def _run(self, call: ToolCall) -> tuple[str, float]:
        tool, instance = self._box.named(call.name), await self._instance(call.name)
        values = msgspec.json.decode(call.arguments)
        found, reward = await _guarded(tool.call(instance, values, self._of(call.name)))
        return found if isinstance(found, str) else msgspec.json.encode(found).decode(), reward

    async def _instance(self, name: str) -> Any:
        """Opened once, whoever of several calls asks first, and again only if that failed."""
        opening = self._instances.get(name)
        if opening is None or (opening.done() and _has_failed(opening)):
            opening = asyncio.ensure_future(_guarded(self._box.named(name).open(self._of(name))))
            opening.add_done_callback(_forget)
            self._instances[name] = opening
        return await asyncio.shield(opening)

    def _of(self, name: str) -> Mapping[str, Any]:
        return self._kwargs.get(name, {})


class _InvalidCall(Exception):
    """The arguments are not those of the tool."""


def _outcome(task: asyncio.Future[tuple[str, float]], late: str) -> tuple[Fault, str, float]:
    if not task.done():
        return "late", late, 0.0
    try:
        text, reward = task.result()
    except _InvalidCall as error:
        return "invalid", f"Error: {error}", 0.0
    except Exception as error:  # the user's own code: the model is told, and the conversation goes on
        return "failed", f"Error: {_said(error)}", 0.0
    return "", text, reward


class _Ended(Exception):
    """What a tool raised that would have ended more than its call, in words."""


async def _guarded(work: Awaitable[Any]) -> Any:
    """Its result. What it raises concerns nobody but the call: not the loop, and not who waits for others."""
    try:
        return await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # ours
        raise _harmless(error) from None
    except (Exception, KeyboardInterrupt, GeneratorExit):  # the second is of whoever sits there, the last of the loop
        raise
    except BaseException as error:
        raise _harmless(error) from None


def _harmless(error: BaseException) -> Exception:
    """As an error that a future may hold."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return _Ended(_said(error))


def _said(error: BaseException) -> str:
    """Its name and words, which are the user's code, too."""
    if isinstance(error, _Ended):
        return str(error)
    name = type(error).__name__
    try:
        words = str(error)
    except Exception as further:
        return f"{name}, which cannot be written: {type(further).__name__}"
    return f"{name}: {words}"


def _finite(reward: Any) -> float:
    value = float(reward)
    if not math.isfinite(value):
        raise ValueError(f"reward {value} is not finite")
    return value


def _has_failed(future: asyncio.Future[Any]) -> bool:
    return future.cancelled() or future.exception() is not None


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # nobody waits for it any more: read, so that asyncio does not complain


async def _in_thread(work: Callable[[], Any]) -> Any:
    """The result of `work`, which runs in a daemon thread: one that hangs keeps no process from ending."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        result: Any = None
        caught: BaseException | None = None
        try:
            result = context.run(work)
        except BaseException as error:  # also `exit()`, of a program that the model wrote
            caught = _harmless(error)
        try:
            loop.call_soon_threadsafe(settle, result, caught)
        except RuntimeError:  # the loop has ended meanwhile: nobody waits
            return

    threading.Thread(target=run, name="headrace-tool", daemon=True).start()
    return await future


def _tool_of(given: Any) -> RunnableTool:
    if isinstance(given, (FunctionTool, VerlTool)):
        return given
    if all(callable(getattr(given, name, None)) for name in _VERL_METHODS):
        return VerlTool(given)
    return FunctionTool(given)


def _checked_schema(schema: Any) -> dict[str, Any]:
    try:
        return normalize_tools([schema])[0]
    except RequestError as error:
        raise ConfigError(error.message.replace("tools[0]", "a tool's schema"), field="tools") from None


def _whole_schema(
    name: str, function: Callable[..., Any], given: Mapping[str, Any] | None, arguments: type[msgspec.Struct] | None
) -> dict[str, Any]:
    if given is not None and "function" in given:
        schema = _checked_schema(given)
        if schema["function"]["name"] != name:
            raise ConfigError(f"tools: the schema of {name!r} names {schema['function']['name']!r}", field="tools")
        return schema
    summary, texts = _documented(function)
    parameters = dict(given) if arguments is None and given is not None else _parameters(arguments, texts)
    described: dict[str, Any] = {"name": name, "description": summary, "parameters": parameters}
    return _checked_schema({"type": "function", "function": described})


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """A docstring's text before its `Args:`, and the text of each argument."""
    parts: Sequence[str] = _ARGUMENTS.split(inspect.getdoc(function) or "", maxsplit=1)
    described = _NEXT_SECTION.split(parts[1], maxsplit=1)[0] if len(parts) > 1 else ""
    return " ".join(parts[0].split()), dict(_ARGUMENT.findall(described))


def _arguments_of(function: Callable[..., Any], name: str, signature: inspect.Signature) -> type[msgspec.Struct]:
    """A struct with the function's parameters as its fields."""
    called = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
    hints = typing.get_type_hints(called, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            message = f"tools: {parameter} of {name} cannot be described; give `FunctionTool` a schema"
            raise ConfigError(message, field="tools")
        default = msgspec.field()
        if isinstance(parameter.default, (bool, int, float, str)) or parameter.default is None:
            default = msgspec.field(default=parameter.default)
        elif parameter.default is not parameter.empty:
            default = msgspec.field(default_factory=lambda: None)  # never read: the function has its own
        fields.append((parameter.name, hints.get(parameter.name, Any), default))
    try:
        made = msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)
        msgspec.json.schema(made)
    except TypeError as error:
        message = f"tools: the signature of {name} cannot be described ({error}); give `FunctionTool` a schema"
        raise ConfigError(message, field="tools") from None
    return made


def _parameters(arguments: type[msgspec.Struct] | None, texts: Mapping[str, str]) -> dict[str, Any]:
    _, parts = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    top = parts.pop("Arguments")
    properties = {
        name: {**described, "description": texts[name]} if name in texts else described
        for name, described in top["properties"].items()
    }
    found = {"type": "object", "properties": properties, "required": top.get("required", [])}
    return {**found, "$defs": parts} if parts else found
