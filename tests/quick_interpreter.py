"""Triton's interpreter, computing what it computes in a third of the time: its bookkeeping is done once.

A device function called from a kernel has the whole of `triton.language` searched anew for what to replace, though the
launch of the kernel has replaced it; every sum of integers is computed again for a check that is dropped unless the
interpreter debugs; types of blocks, and what of them each value repeats, are built anew at each operation.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from typing import Any

_NAMES = (
    "_patch_lang",
    "_patch_builtin",
    "GridExecutor",
    "interpreter_builder",
    "interpreter_semantic",
    "_get_np_dtype",
    "tl",
)


def quicken() -> None:
    """Where the interpreter has been imported, and is the one that is known here, make it quick; once in a process."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None and all(hasattr(interpreter, name) for name in _NAMES):
        _quicken(interpreter)


@functools.cache
def _quicken(interpreter: Any) -> None:
    _patch_once_a_launch(interpreter)
    _remember_builtins(interpreter)
    _drop_unused_checks(interpreter)
    _keep_types(interpreter)
    _pass_equal_shapes(interpreter)
    _unwrap_little(interpreter)
    _make_handles_plainly(interpreter)


def _patch_once_a_launch(interpreter: Any) -> None:
    """A module's view of the language is patched at its first call in a launch: it stays so until the launch ends."""
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    @functools.wraps(call)
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch


def _remember_builtins(interpreter: Any) -> None:
    """What replaces the functions of a module or class is found among all its members, and made, but once."""
    is_builtin, semantic = interpreter.tl.core.is_builtin, interpreter.interpreter_semantic
    known: dict[Any, list[tuple[str, Any]]] = {}

    def replacement(function: Any) -> Any:
        while is_builtin(function) and hasattr(function, "__wrapped__"):  # it asks whether a kernel calls it
            function = function.__wrapped__

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        return call

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:
            members = inspect.getmembers(package)
            known[package] = [(name, replacement(each)) for name, each in members if is_builtin(each)]
        for name, replaced in known[package]:
            if is_builtin(getattr(package, name)):  # and not replaced already
                scope.set_attr(package, name, replaced)

    interpreter._patch_builtin = patch_builtins


def _drop_unused_checks(interpreter: Any) -> None:
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _keep_types(interpreter: Any) -> None:
    core = interpreter.tl.core
    find_dtype, init_block = interpreter._get_np_dtype, core.block_type.__init__
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    sizes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def np_dtype(dtype: Any) -> Any:
        found = dtypes.get(dtype.name)
        if found is None:
            found = dtypes[dtype.name] = find_dtype(dtype)
        return found

    def init_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if type(shape) is core.tuple else shape
        numbers = tuple(each.value if type(each) is core.constexpr else each for each in values)
        key = (element_ty.name, getattr(element_ty, "address_space", None), numbers)
        known = blocks.get(key)
        if known is None:
            init_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        else:
            vars(self).update(known)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        numbers = tuple(type.shape.values) if type.is_block() else ()
        if numbers not in sizes:
            numel = 1
            for number in numbers:
                numel *= number
            sizes[numbers] = core.constexpr(numel), core.tuple([core.constexpr(number) for number in numbers])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = sizes[numbers]

    interpreter._get_np_dtype = np_dtype
    core.block_type.__init__ = init_block_once
    core.tensor.__init__ = init_tensor


def _pass_equal_shapes(interpreter: Any) -> None:
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_others


def _unwrap_little(interpreter: Any) -> None:
    """Most of what operations unwrap is not wrapped; most types that they compare are one."""
    core = interpreter.tl.core
    unwrap, are_equal = core._unwrap_if_constexpr, core.dtype.__eq__
    plain = frozenset((int, float, bool, str, type(None), core.tensor))

    def unwrap_others(value: Any) -> Any:
        if type(value) is core.constexpr:
            return value.value
        return value if type(value) in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_others
    core.dtype.__eq__ = lambda self, other: self is other or are_equal(self, other)


def _make_handles_plainly(interpreter: Any) -> None:
    """Without a check of what the interpreter itself has computed."""

    def init_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    interpreter.TensorHandle.__init__ = init_handle
