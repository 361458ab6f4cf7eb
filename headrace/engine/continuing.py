"""A sample that goes on from what another engine has made of it. Owns how its pieces become one, and what is asked of
this engine for the rest.

The next request is the prompt and the tokens that there are, with the seed that they were drawn with and what is left
of the limits: with `numerics="invariant"` the tokens are those of a sample that was never cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from headrace.engine.fields import name_of
from headrace.engine.requests import GenerateItem
from headrace.engine.sample import extend_spans
from headrace.types.errors import RequestError
from headrace.types.generation import Generation, RoutedExperts
from headrace.types.request import Request, pack_ids

FIELD = "before"
_LISTS = ("logprobs", "top_logprobs", "token_ids_logprobs", "kept_token_ids")
"""What has one entry per token, if any."""
_PER_PROMPT_TOKEN = ("prompt_logprobs", "prompt_top_logprobs", "prompt_token_ids_logprobs")
_OF_PROMPT = (*_PER_PROMPT_TOKEN, "prompt_version_spans", "num_prompt_tokens", "num_cached_tokens")


def joined(pieces: Sequence[Generation]) -> Generation:
    """Pieces of one sample, which follow each other, as one; what is of the prompt is the first one's."""
    if len(pieces) == 1:
        return pieces[0]
    first, last = pieces[0], pieces[-1]
    spans, epochs = list[tuple[str, int]](), list[int]()
    for piece in pieces:
        extend_spans(spans, epochs, piece)
    lists = {name: _chained(getattr(each, name) for each in pieces) for name in ("token_ids", *_LISTS)}
    return msgspec.structs.replace(
        last,
        **lists,
        **{name: getattr(first, name) for name in _OF_PROMPT},
        text="".join(each.text for each in pieces),
        version_spans=spans,
        version_epochs=epochs,
        num_preemptions=max(each.num_preemptions for each in pieces),
    )


def checked(before: Generation) -> Generation:
    """`before`, if its lists can be what an engine has made. Raises `RequestError`."""
    if not before.request_id:
        raise _no_sample("no request_id")
    num_tokens = len(before.token_ids)
    is_aligned = all(len(getattr(before, name)) in (0, num_tokens) for name in _LISTS)
    counts = [count for _, count in before.version_spans]
    if not is_aligned or min(counts, default=1) < 1 or sum(counts) != num_tokens:
        raise _no_sample("lists that do not fit its tokens")
    if len(before.logprobs) != num_tokens or len(before.version_epochs) != len(counts):
        raise _no_sample("lists that do not fit its tokens")
    if any(len(getattr(before, name)) not in (0, before.num_prompt_tokens) for name in _PER_PROMPT_TOKEN):
        raise _no_sample("scores that do not fit its prompt")
    has_seed = before.finish_reason == "error" if before.seed is None else 0 <= before.seed < 1 << 64
    if not has_seed:
        raise _no_sample("a seed that is none")
    return before


def check_made(item: GenerateItem) -> None:
    """Raise `RequestError` where what `item` has before is not what was asked for: replies are written by what was."""
    before, options = item.before, item.logprobs
    assert before is not None
    name_of(before.request_id, FIELD)
    if (before.prompt_index, before.index) != (item.prompt_index, item.index):
        raise _no_sample("the number of another one")
    asked = options.num_top > 0, bool(options.token_ids), options.max_kept > 0
    for wants, name in zip(asked, _LISTS[1:], strict=True):
        if before.token_ids and bool(getattr(before, name)) != wants:
            raise _no_sample(f"{name} that were not asked for" if not wants else f"no {name}, which are asked for")
    routed = before.routed_experts
    if routed is not None and not (options.routed_start is not None and _is_whole(routed)):
        raise _no_sample("experts of no model")


def ids_of(before: Generation) -> Iterable[int]:
    """All that have to be tokens of the model."""
    maps = (before.top_logprobs, before.token_ids_logprobs, before.kept_token_ids)
    of_prompt = (before.prompt_top_logprobs, before.prompt_token_ids_logprobs)
    scored = (each or () for each in itertools.chain(*of_prompt))
    return itertools.chain(before.token_ids, *itertools.chain(*maps), *scored)


def rest_of(item: GenerateItem) -> GenerateItem:
    """What is to be asked for `item`, which is prepared, behind what it has before. Raises `RequestError`."""
    before, packed = item.before, item.packed or b""
    assert before is not None
    checked(before)
    num_tokens, params = len(before.token_ids), item.params
    if before.num_prompt_tokens != len(packed) // 4:
        raise _no_sample(f"a prompt of {before.num_prompt_tokens} tokens, and has {len(packed) // 4} here")
    if num_tokens > params.max_new_tokens:
        raise _no_sample(f"{num_tokens} tokens, over {params.max_new_tokens}")
    left = {
        "max_new_tokens": params.max_new_tokens - num_tokens,
        "min_new_tokens": max(0, params.min_new_tokens - num_tokens),
    }
    logprobs = item.logprobs
    if num_tokens and logprobs.prompt_start is not None:  # the scores came with the first token
        logprobs = msgspec.structs.replace(logprobs, prompt_start=None)
    rest: GenerateItem = msgspec.structs.replace(
        item,
        packed=packed + pack_ids(before.token_ids),
        params=msgspec.structs.replace(params, **left),
        seed=before.seed,
        logprobs=logprobs,
        num_output_ids_in_prompt=item.num_output_ids_in_prompt + num_tokens,
    )
    return rest


def num_before(item: GenerateItem) -> int:
    """How many tokens there are already."""
    return 0 if item.before is None else len(item.before.token_ids)


def prompt_of(item: GenerateItem, request: Request) -> bytes:
    """The packed ids of the prompt, without what came before."""
    return request.prompt if item.before is None else item.packed or b""


def _is_whole(routed: RoutedExperts) -> bool:
    size = 2 * routed.num_layers * routed.num_per_token
    return min(routed.num_layers, routed.num_per_token) > 0 and len(routed.experts) % size == 0


def _chained(lists: Iterable[list[object]]) -> list[object]:
    return list(itertools.chain.from_iterable(lists))


def _no_sample(what: str) -> RequestError:
    return RequestError(f"{FIELD}: what it goes on from has {what}", field=FIELD)
