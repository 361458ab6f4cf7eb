"""Bounds on products: what no field is too large for by itself, and all of a call's together are. Owns these constants.

Everything here is checked before anything of that size is made. What the samples of a prompt share (its ids, and its
`SamplingParams` with stop strings and logit bias) is made once: `n` multiplies nothing of it and needs no bound there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.types.errors import RequestError
from headrace.types.sampling_params import LogprobOptions, SamplingParams

MAX_LOGPROB_VALUES = 1 << 24
"""Log-probabilities of one prompt's samples beside those of generated tokens: of the prompt, of top and of asked ids.
Entries of dictionaries, about 120 bytes each. So many of one sequence also fit the message that ends it."""

MAX_BODY_VALUES = 1 << 23
"""The same of all prompts of one HTTP body, where each is a JSON triple too; and prompt ids that its replies repeat."""

MAX_KEPT_IDS = 1 << 22
MAX_CALL_KEPT_IDS = 1 << 26
"""Ids that the tokens of one sample, and those of all samples of a call, could have been. How many there are is known
only then: each sample may have its part, and ends with an error at more. 4 bytes each, and 40 in a caller's list."""

MAX_ROUTED_EXPERTS = 1 << 26
"""Experts of all tokens and layers that the samples of one prompt, or those of one HTTP body, are told at most: 2 bytes
each, and six in the text of a reply."""

MAX_CALL_STOP_CHARACTERS = 1 << 20
"""Characters of the stop strings of all different `sampling_params` of a call: sixteen full sets."""

MAX_CALL_STOP_TOKEN_IDS = 1 << 18
MAX_CALL_LOGIT_BIAS = 1 << 18
"""Stop ids, and entries of logit biases, of all different `sampling_params` of a call. An entry takes some 300 bytes
in the front and the core together: 80 MB at most."""


def max_kept_each(num_samples: int) -> int:
    """How many such ids each of a call's samples may have."""
    return min(MAX_KEPT_IDS, MAX_CALL_KEPT_IDS // max(1, num_samples))


def check_call(params: Sequence[SamplingParams]) -> None:
    """Raise `RequestError` if the `sampling_params` of one call are too much together. Shared ones count once."""
    distinct = dict(zip(map(id, params), params, strict=True)).values()
    if len(distinct) == 1:
        return  # the bounds of each field say enough
    for name, limit, total in (
        ("stop", MAX_CALL_STOP_CHARACTERS, sum(len(stop) for each in distinct for stop in each.stop)),
        ("stop_token_ids", MAX_CALL_STOP_TOKEN_IDS, sum(len(each.stop_token_ids) for each in distinct)),
        ("logit_bias", MAX_CALL_LOGIT_BIAS, sum(len(each.logit_bias or ()) for each in distinct)),
    ):
        if total > limit:
            what = "characters" if name == "stop" else "entries"
            message = f"sampling_params: {name} has {total} {what} over all prompts of a call; at most {limit} may be"
            raise RequestError(message, field=f"sampling_params.{name}")


def num_logprob_values(options: LogprobOptions, num_prompt: int, params: SamplingParams) -> int:
    """Most log-probabilities beside those of generated tokens that the samples of one prompt can bring."""
    num_scored = 0 if options.prompt_start is None else max(0, num_prompt - options.prompt_start)
    num_further = options.num_top + len(options.token_ids)
    return params.n * (num_scored * (1 + num_further) + params.max_new_tokens * num_further)


def check_kept(options: LogprobOptions, params: SamplingParams, *, leaves_some_out: bool) -> None:
    """Raise `RequestError` if the tokens that are left are asked for where all are."""
    if options.max_kept and params.max_new_tokens and not (leaves_some_out or params.is_greedy):
        name = "return_kept_token_ids"
        message = f"{name} needs a top_p, top_k or min_p that leaves some tokens out: without, every token is kept"
        raise RequestError(message, field=name)


def check_routed(prompts: Iterable[tuple[LogprobOptions, int, SamplingParams]], shape: tuple[int, int] | None) -> None:
    """Raise `RequestError` if these prompts, each with its number of ids, ask for experts that are not kept, or for too
    many together. `shape` is (layers, experts per token), None for an engine that keeps none."""
    number, name = 0, "return_routed_experts"
    for options, num_prompt, params in prompts:
        if options.routed_start is None:
            continue
        if shape is None:
            message = f"{name} needs an engine that was started with keep_routed_experts"
            raise RequestError(message, field=name)
        num_positions = max(0, num_prompt + params.max_new_tokens - 1 - options.routed_start)
        number += params.n * num_positions * shape[0] * shape[1]
    if number > MAX_ROUTED_EXPERTS:
        message = f"{name} asks for up to {number} experts over all tokens, layers and samples"
        raise RequestError(f"{message}; at most {MAX_ROUTED_EXPERTS} may be", field=name)


def check_body(prompts: Iterable[tuple[LogprobOptions, int, SamplingParams]], repeats_ids_for: str = "") -> None:
    """Raise `RequestError` if all prompts of an HTTP body together, each with its number of ids, may bring too many
    log-probabilities, or prompt ids in the replies to all samples, for which the body's key `repeats_ids_for` asks."""
    num_values = num_ids = 0
    for options, num_prompt, params in prompts:
        num_values += num_logprob_values(options, num_prompt, params)
        check_logprob_values(num_values, options, MAX_BODY_VALUES)
        num_ids += params.n * num_prompt if repeats_ids_for else 0
        if num_ids > MAX_BODY_VALUES:
            message = f"{repeats_ids_for} asks for more than {MAX_BODY_VALUES} prompt ids over all samples"
            raise RequestError(message, field=repeats_ids_for)


def check_logprob_values(num_values: int, options: LogprobOptions, limit: int = MAX_LOGPROB_VALUES) -> None:
    """Raise `RequestError` naming the field if so many log-probabilities are too many."""
    if num_values > limit:
        asks_for_ids = "logprob_token_ids" if options.token_ids else "logprob_start"
        field = "top_logprobs" if options.num_top else asks_for_ids
        message = f"{field} asks for up to {num_values} values over all tokens and samples; at most {limit} may be"
        raise RequestError(message, field=field)
