"""Triton's interpreter, computing what it computes in a third of the time: its bookkeeping is done once.

A device function called from a kernel has the whole of `triton.language` searched anew for what to replace, though the
launch of the kernel has replaced it; every sum of integers is computed again for a check that is dropped unless the
interpreter debugs; types of blocks, and what of them each value repeats, are built anew at each operation.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

_NAMES = ("_patch_lang", "GridExecutor", "interpreter_builder", "interpreter_semantic", "_get_np_dtype", "tl")


def quicken() -> None:
    """Where the interpreter has been imported, and is the one that is known here, make it quick; once in a process."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None and all(hasattr(interpreter, name) for name in _NAMES):
        _quicken(interpreter)


@functools.cache
def _quicken(interpreter: Any) -> None:
    _patch_once_a_launch(interpreter)
    _drop_unused_checks(interpreter)
    _keep_types(interpreter)
    _pass_equal_shapes(interpreter)


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
