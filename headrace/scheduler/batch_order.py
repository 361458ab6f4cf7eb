"""The order in which requests that came together are queued. Owns that order only; between batches it is first come."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.types.request import Request


def longest_first(requests: Sequence[Request]) -> list[Request]:
    """Those that may generate most come first, so that the batch as a whole ends sooner: one that starts late is short
    (longest processing time first; Graham, SIAM Journal on Applied Mathematics, 1969).

    Requests of one prompt count as their longest and keep their order, so that rows sharing pages stay neighbours;
    what may generate equally much keeps its order too.
    """
    longest: dict[tuple[str, bytes], int] = {}
    for request in requests:
        key = (request.namespace, request.prompt)
        longest[key] = max(longest.get(key, 0), request.max_new_tokens)
    return sorted(requests, key=lambda request: -longest[request.namespace, request.prompt])
