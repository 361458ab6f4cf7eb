"""Pushing a trainer's weights into an engine. Owns the way from trainer names to Hugging Face names, and the proof.

Knows nothing of optimizers or processes: it reads tensors and calls the engine's update. Loads no torch of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.engine import Engine
from headrace.engine.control import version_of
from headrace.engine.tensors import describe, named_pairs, same_memory, whole
from headrace.types.errors import WeightUpdateError
from headrace.types.plain_values import as_choice, as_flag
from headrace.types.weights import InFlight, UpdateMode, UpdateReport
from headrace.weights.weight_map import FLOAT_DTYPES, TIED_HEAD, WeightMap, is_recomputed

if TYPE_CHECKING:
    import torch

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a parameter's name that data parallelism, compilation, FSDP and activation checkpointing put in."""


class PushReport(msgspec.Struct, frozen=True):
    """What a push did. `seconds` is the caller's whole wait; `update.pause_ms` is how long no step could run."""

    update: UpdateReport
    seconds: float
    is_verified: bool


def hf_name(name: str) -> str:
    """The Hugging Face name of a trainer's parameter: the same, without what wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def hf_named_tensors(
    weights: torch.nn.Module | Mapping[str, torch.Tensor], *, keep_tied_head: bool = False
) -> list[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) pairs of a module or a state dict; no tensor is copied.

    A tied output head is left out (it *is* the embedding) unless it is to be kept, for an engine that does not tie;
    what every model computes for itself is always left out. A DTensor becomes the plain tensor that it is.
    Raises `WeightUpdateError` if two parameters come to bear one name, other ranks hold a part of a DTensor, or one
    has no values that can be read.
    """
    keep_tied_head = as_flag(keep_tied_head, "keep_tied_head", WeightUpdateError)
    is_module = hasattr(weights, "state_dict") and hasattr(weights, "named_parameters")
    if not isinstance(weights, Mapping) and not is_module:
        message = f"weights must be a module or a state dict, not {type(weights).__name__}"
        raise WeightUpdateError(message, field="weights")
    state = weights if isinstance(weights, Mapping) else _state_of(weights)
    tensors: dict[str, Any] = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise WeightUpdateError(f"weights holds {name!r}, which is no name", field="weights")
        clean = hf_name(name)
        if clean in tensors:
            raise WeightUpdateError(f"{name} and another parameter are both {clean}", field=clean)
        if is_recomputed(clean):
            continue
        if not hasattr(tensor, "detach"):
            raise WeightUpdateError(f"{clean} is a {type(tensor).__name__}, not a tensor", field=clean)
        held = whole(clean, tensor)
        describe(clean, held)
        tensors[clean] = held.detach()
    head = None if keep_tied_head else tensors.get(TIED_HEAD)
    if head is not None and any(same_memory(head, other) for name, other in tensors.items() if name != TIED_HEAD):
        del tensors[TIED_HEAD]
    return list(tensors.items())


def _state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """Its state dict. Where torch would fail to make one, `WeightUpdateError` naming its first parameter."""
    from headrace.weights.staging import unreadable_now

    name, problem = next((hf_name(name) for name, _ in module.named_parameters()), ""), unreadable_now()
    if problem:
        raise WeightUpdateError(f"{name} {problem}", field=name)
    return module.state_dict()


def push_weights(
    engine: Engine,
    weights: torch.nn.Module | Mapping[str, torch.Tensor],
    version: str | int,
    *,
    mode: UpdateMode = "auto",
    in_flight: InFlight = "drain",
    verify: bool = False,
) -> PushReport:
    """Make `weights` the engine's live weights, labelled `version`. Returns once they serve.

    `verify` then compares the digests of the engine's live memory with those of `weights` in the engine's dtype.
    Raises `WeightUpdateError` naming the tensor when the engine refuses the weights (the old ones serve on), or, after
    the fact, when what it reports or holds is not what was sent.
    """
    from headrace.models import weight_map

    started = time.perf_counter()
    verify = as_flag(verify, "verify", WeightUpdateError)
    model, dtype = engine.resolved.model, engine.resolved.dtype
    pairs = hf_named_tensors(weights, keep_tied_head=not model.tie_word_embeddings)
    label = version_of(version)
    report = engine.update_weights_from_tensor(pairs, label, mode=mode, in_flight=in_flight)
    if (report.version, report.num_tensors) != (label, len(pairs)):
        sent, got = f"{len(pairs)} as {label}", f"{report.num_tensors} as {report.version}"
        raise WeightUpdateError(f"tensors sent: {sent}; taken by the engine: {got}", field="version")
    if verify:
        _require_equal(live_digests(pairs, weight_map(model), dtype), engine.digest())
    return PushReport(report, time.perf_counter() - started, verify)


def tensor_digests(pairs: Iterable[tuple[str, torch.Tensor]], dtype: str) -> dict[str, str]:
    """The digest of each tensor in `dtype`: what `Engine.digest` says of an engine that holds it.

    `dtype` is a dtype that an engine may hold, as "float32". Raises `WeightUpdateError` naming the field or the tensor.
    """
    import torch

    from headrace.weights.position_sum import PositionKeys, position_digest

    target: torch.dtype = getattr(torch, as_choice(dtype, FLOAT_DTYPES, "dtype", WeightUpdateError))
    keys, digests = PositionKeys(torch.device("cpu")), {}
    for name, tensor in named_pairs(pairs):
        if not isinstance(tensor, torch.Tensor) or describe(name, tensor).dtype not in FLOAT_DTYPES:
            raise WeightUpdateError(f"{name} is no torch tensor of {', '.join(FLOAT_DTYPES)}", field=name)
        plain = tensor.detach().to("cpu", target).resolve_neg()
        digests[name] = position_digest(plain.contiguous().view(-1), keys)
    return digests


def live_digests(pairs: Iterable[tuple[str, torch.Tensor]], table: WeightMap, dtype: str) -> dict[str, str]:
    """What `Engine.digest` says of an engine of that dtype that took these tensors: by the names of files, whichever
    names of the table they have, and in the dtypes that its parameters have. A parameter is built at a time."""
    import torch

    from headrace.weights.store import WeightStore

    tensors = dict(pairs)
    digests: dict[str, str] = {}
    for alias, target in table.aliases.items():
        if alias in tensors:  # the engine has checked that both are equal where both are sent
            tensors.setdefault(target, tensors[alias])
    for part in table.parts():
        names = part.rules_by_name.keys() | part.other_rules.keys()
        store = WeightStore(part, getattr(torch, dtype), torch.device("cpu"), check_finite=False)
        store.load((name, tensors[name]) for name in names & tensors.keys())
        digests |= store.digest()
    return digests


def _require_equal(sent: Mapping[str, str], live: Mapping[str, str]) -> None:
    names = sorted(name for name in sent.keys() | live.keys() if sent.get(name) != live.get(name))
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise WeightUpdateError(f"live weights differ from those sent in {len(names)} tensors: {shown}", field=names[0])
