"""The sizes steps are padded to, so that a few captured launches serve every step. Data and lookups only."""

from __future__ import annotations

from bisect import bisect_left

from headrace.attention.base import Bucket

_LAST_CHOICE = 2048  # tokens; larger steps pick what a smaller one or the greatest has picked


def row_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, by 8 to 64, by 16 to 256, by 32 beyond, up to `max_rows`: padding costs at most an eighth."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows + 32, 32)]
    return [size for size in sizes if size < max_rows] + [max_rows]


def token_sizes(max_tokens: int) -> list[int]:
    """16, 32, 64, then by 128 to 1,024, by 256 beyond, up to `max_tokens`."""
    sizes = [16, 32, 64, *range(128, 1024, 128), *range(1024, max_tokens + 256, 256)]
    return [size for size in sizes if size < max_tokens] + [max_tokens]


class Buckets:
    """Sizes for steps of at most `max_rows` rows; steps of more than `max_graph_tokens` tokens get their own."""

    def __init__(self, max_rows: int, max_tokens: int, max_graph_tokens: int) -> None:
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._row_sizes = row_sizes(min(max_rows, max_tokens))
        self._token_sizes = token_sizes(min(max_tokens, max_graph_tokens))

    @property
    def captured(self) -> list[Bucket]:
        """Every bucket worth capturing, the largest first: later captures reuse its memory."""
        mixed = [self._mixed(size) for size in self._token_sizes]
        decode = [Bucket(size, size, True) for size in self._row_sizes]
        return sorted(mixed + decode, key=lambda bucket: -bucket.num_tokens)

    @property
    def uncaptured(self) -> list[Bucket]:
        """Sizes beyond the captured ones to run once at start: kernels are picked by size, finely up to 256 rows."""
        most = min(self._max_tokens, _LAST_CHOICE)
        sizes = {*row_sizes(min(most, 256)), *token_sizes(most)}
        return [self._mixed(size) for size in sorted(sizes) if size > self._token_sizes[-1]]

    @property
    def greatest(self) -> Bucket:
        """The largest step there may be."""
        return self._mixed(self._max_tokens)

    @property
    def sampled(self) -> list[int]:
        """Every number of sampled rows worth capturing, the largest first."""
        return self._row_sizes[::-1]

    def of_step(self, num_tokens: int, num_rows: int) -> Bucket:
        """The least bucket that holds a step."""
        if num_tokens == num_rows:
            size = self.num_sampled(num_rows)
            return Bucket(size, size, True)
        if num_tokens > self._token_sizes[-1]:
            return Bucket(num_tokens, self.num_sampled(num_rows), False)
        return self._mixed(self._token_sizes[bisect_left(self._token_sizes, num_tokens)])

    def num_sampled(self, num_rows: int) -> int:
        """The least number of rows to sample that holds these."""
        return self._row_sizes[bisect_left(self._row_sizes, num_rows)]

    def _mixed(self, num_tokens: int) -> Bucket:
        return Bucket(num_tokens, min(num_tokens, self._max_rows), False)
