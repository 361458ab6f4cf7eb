from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from headrace.engine import pacing
from headrace.engine.pacing import MAX_WAKES_PER_TURN, Pacer
from headrace.engine.requests import GenerateItem
from headrace.engine.stream import EndKind, Stream, StreamGroup, whole_samples
from headrace.engine.text_feed import TextStart
from headrace.text import Tokenizer
from headrace.types.errors import ErrorInfo, HeadraceError, PoisonedError, RequestError
from headrace.types.generation import Generation
from headrace.types.request import Delta, Finish, Request, pack_ids
from headrace.types.sampling_params import SamplingParams
from tests.engine.builders import EOS_ID, byte_tokenizer
from tests.text.builders import byte_fallback, word_pieces
from tests.types.packing import pack_floats


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer())


class Feed:
    """A stream fed by hand, and how it ended."""

    def __init__(self, tokenizer: Tokenizer | None, stream: bool = True, **params: Any) -> None:
        sampling = SamplingParams(**params)
        item = GenerateItem(input_ids=[1], params=sampling, stream=stream)
        deliver = 1 if stream or sampling.stop else 0
        self.ends: list[EndKind] = []
        request = Request(1, "r", pack_ids([1]), 8, 0, deliver_every=deliver)
        start = TextStart(tokenizer, sampling) if tokenizer else None
        self.stream = Stream(item, request, start, lambda _, kind: self.ends.append(kind))

    def tokens(self, data: bytes | list[int], finish: Finish | None = None) -> None:
        ids = list(data)
        logprobs, spans = pack_floats([0.0] * len(ids)), (("a", len(ids)),)
        self.stream.on_delta(Delta(1, pack_ids(ids), logprobs, spans, finish, span_epochs=(0,)))


def run(awaitable: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(awaitable, 10)

    return asyncio.run(main())


def result(feed: Feed) -> Generation:
    answer = run(feed.stream.result())
    assert isinstance(answer, Generation)
    assert len(answer.token_ids) == len(answer.logprobs) == sum(count for _, count in answer.version_spans)
    return answer


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_ends_at_the_token_that_completes_it(tokenizer: Tokenizer, size: int) -> None:
    """However the tokens come: one by one, or many at once as under overlap."""
    text = b"one two three four"
    feed = Feed(tokenizer, stop=("two th", "zzz"))
    for start in range(0, len(text), size):
        feed.tokens(text[start : start + size])
    answer = result(feed)
    assert answer.token_ids == list(b"one two th"), "the completing token is kept, what overshoots is not"
    assert (answer.text, answer.finish_reason, answer.matched) == ("one ", "stop", "two th")
    assert feed.ends == ["dropped"], "the core is told once"


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize("min_new_tokens", [0, 4])
def test_tokens_after_a_stop_string_are_dropped_though_its_text_came_late(size: int, min_new_tokens: int) -> None:
    """A run of byte tokens has no text before an ordinary token, or the end, follows it."""
    library = byte_fallback()
    ids = library.convert_tokens_to_ids([*("é", "<0x0A>"), *("é", "<0x0A>", "<0x41>", "<0x42>"), *("é", "é")])
    assert library.unk_token_id not in ids
    stop_at = 2 if min_new_tokens == 0 else 4
    for known, finish in ((ids, None), (ids[:6], Finish("length"))):
        feed = Feed(Tokenizer(library), stop=("\n",), min_new_tokens=min_new_tokens)
        for start in range(0, len(known), size):
            is_last = start + size >= len(known)
            feed.tokens(known[start : start + size], finish if is_last else None)
        answer = result(feed)
        assert (answer.token_ids, answer.matched) == (known[:stop_at], "\n")
        assert answer.text == ("é" if min_new_tokens == 0 else "é\né")


@pytest.mark.parametrize("build", [byte_fallback, word_pieces])
def test_no_piece_holds_a_token_beyond_the_stop_string_though_its_text_is_held_back(build: Any) -> None:
    library = build()
    tokens = ["e", *("<0xC3>", "<0xA9>") * 4] if build is byte_fallback else ["a", "##b", "c", "##d", *["##b"] * 5]
    ids, stop = library.convert_tokens_to_ids(tokens), "\u00e9\u00e9" if build is byte_fallback else "b cd"
    num_kept = 5 if build is byte_fallback else 4
    feed, pieces = Feed(Tokenizer(library), stop=(stop,)), []
    for number, token_id in enumerate(ids, 1):
        feed.tokens([token_id])
        pieces.append(feed.stream.take())
        assert feed.stream.is_done == (number >= num_kept)
    whole = result(feed)
    assert [token for piece in pieces if piece for token in piece.token_ids] == whole.token_ids == ids[:num_kept]
    assert "".join(piece.text for piece in pieces if piece) == whole.text == tokens[0] and whole.matched == stop
    assert feed.ends == ["dropped"]


def test_no_stop_trim_keeps_the_matched_text(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer, stop=("two",), no_stop_trim=True)
    feed.tokens(b"one two three")
    assert result(feed).text == "one two"


def test_a_stop_string_in_the_last_delta_wins_over_its_finish(tokenizer: Tokenizer) -> None:
    for finish in (Finish("length"), Finish("abort", message="Aborted"), Finish("stop", matched=EOS_ID)):
        feed = Feed(tokenizer, stop=("wo",))
        feed.tokens([*b"two x", EOS_ID], finish)
        answer = result(feed)
        assert (answer.text, answer.token_ids, answer.matched) == ("t", list(b"two"), "wo")
        assert feed.ends == ["answered"]


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_may_begin_before_min_new_tokens(tokenizer: Tokenizer, size: int, stream: bool) -> None:
    """It counts once it is complete with token number `min_new_tokens` or a later one."""
    for text, stop, minimum, keep, expected in (
        (b"abcde", "bc", 3, False, ("a", b"abc")),
        (b"abcde", "bc", 3, True, ("abc", b"abc")),
        (b"abcde", "bc", 4, False, ("abcde", b"abcde")),
        (b"abcbc", "bc", 4, False, ("abc", b"abcbc")),
        (b"aaaaa", "aa", 3, False, ("a", b"aaa")),
        (b"abcde", "abcde", 5, False, ("", b"abcde")),
    ):
        feed = Feed(tokenizer, stream=stream, stop=stop, min_new_tokens=minimum, no_stop_trim=keep)
        for start in range(0, len(text), size):
            feed.tokens(text[start : start + size], Finish("length") if start + size >= len(text) else None)
        answer = result(feed)
        assert (answer.text, bytes(answer.token_ids)) == expected
        assert answer.matched == (stop if len(expected[0]) < len(text) else None)


def test_text_is_not_searched_before_min_new_tokens(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer, stop=("b",), min_new_tokens=4)
    feed.tokens(b"abcab")
    assert result(feed).token_ids == list(b"abcab")
    feed = Feed(tokenizer, stop=("b",), min_new_tokens=2)
    feed.tokens(b"abcab")
    assert result(feed).token_ids == list(b"ab")


def test_a_special_token_can_be_a_stop_string_though_its_text_is_hidden(tokenizer: Tokenizer) -> None:
    [special] = tokenizer.encode("<|user|>")
    for skip in (True, False):
        feed = Feed(tokenizer, stop=("<|user|>", "bc!"), skip_special_tokens=skip)
        feed.tokens([*b"abc", special, *b"late"])
        answer = result(feed)
        assert (answer.text, answer.token_ids, answer.matched) == ("abc", [*b"abc", special], "<|user|>")


def test_held_back_text_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer, stop=("abcd",))
    feed.tokens(b"xabc")
    feed.tokens(b"", Finish("length"))
    answer = result(feed)
    assert (answer.text, answer.finish_reason, answer.matched) == ("xabc", "length", None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_token_is_in_the_ids_and_not_in_the_text(tokenizer: Tokenizer, stream: bool) -> None:
    feed = Feed(tokenizer, stream)
    feed.tokens(b"abz", Finish("stop", matched=ord("z")))
    answer = result(feed)
    assert (answer.text, answer.token_ids, answer.matched) == ("ab", list(b"abz"), ord("z"))
    feed = Feed(tokenizer, stream, no_stop_trim=True)
    feed.tokens(b"abz", Finish("stop", matched=ord("z")))
    assert result(feed).text == "abz"


def test_pieces_join_to_the_result(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer)
    pieces: list[Generation] = []

    async def consume() -> None:
        async for piece in feed.stream:
            pieces.append(piece)

    async def produce() -> None:
        consumer = asyncio.create_task(consume())
        for part in (b"h\xc3", b"\xa9", b"llo", b"\xff"):
            feed.tokens(part)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        feed.tokens(b"!", Finish("length"))
        await consumer

    run(produce())
    whole = result(feed)
    assert len(pieces) == 5 and [piece.finish_reason for piece in pieces] == [None] * 4 + ["length"]
    assert "".join(piece.text for piece in pieces) == whole.text == "héllo\ufffd!"
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids


def test_a_slow_reader_gets_one_larger_piece(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer)
    for letter in b"abc":
        feed.tokens([letter])
    piece = run(anext(feed.stream))
    assert (piece.text, piece.token_ids) == ("abc", list(b"abc"))
    assert feed.stream.take() is None


def test_an_error_raises_from_result_and_from_iteration(tokenizer: Tokenizer) -> None:
    error = ErrorInfo("PoisonedError", "no")
    for read in (Stream.result, anext):
        feed = Feed(tokenizer)
        feed.tokens(b"", Finish("error", error=error))
        with pytest.raises(PoisonedError, match="no"):
            run(read(feed.stream))
        assert feed.ends == ["answered"]


def test_whole_samples_are_in_order_whichever_ends_first() -> None:
    feeds = [Feed(None, stream=False) for _ in range(50)]

    async def read() -> list[Generation]:
        feeds[7].tokens([7], Finish("length"))
        reading = asyncio.create_task(whole_samples([feed.stream for feed in feeds]))
        await asyncio.sleep(0)
        for number in random.Random(0).sample(range(50), 50):
            feeds[number].tokens([number], Finish("length"))
        return await reading

    assert [piece.token_ids for piece in run(read())] == [[number] for number in range(50)]


def test_an_error_is_told_though_earlier_samples_still_run() -> None:
    feeds = [Feed(None, stream=False) for _ in range(3)]
    feeds[2].tokens(b"", Finish("error", error=ErrorInfo("PoisonedError", "no")))
    with pytest.raises(PoisonedError, match="no"):
        run(whole_samples([feed.stream for feed in feeds]))


def test_cancelling_tells_the_core_once(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer)
    feed.tokens(b"a")
    feed.stream.cancel()
    feed.stream.cancel()
    feed.tokens(b"late", Finish("length"))
    assert feed.ends == ["dropped"]
    assert result(feed).token_ids == list(b"a")


def test_a_delta_the_front_cannot_read_fails_its_own_sequence_only(tokenizer: Tokenizer) -> None:
    feed = Feed(tokenizer)
    feed.stream.on_delta(Delta(1, b"\x01", b""))
    with pytest.raises(HeadraceError, match="failed on this sequence"):
        run(feed.stream.result())
    assert feed.ends == ["dropped"]


@pytest.mark.parametrize("stream", [True, False])
def test_ids_without_text_fail_their_own_sequence_only(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    tokenizer = Tokenizer(word_pieces())

    def refuse(*_: Any) -> str:
        raise RequestError("the tokenizer cannot decode these ids", field="ids")

    monkeypatch.setattr(tokenizer, "decode", refuse)
    feed = Feed(tokenizer, stream=stream)
    feed.tokens([1, 2, 3], Finish("length"))
    with pytest.raises(RequestError, match="cannot decode"):
        run(feed.stream.result())
    assert feed.ends == ["answered"]


def test_a_group_yields_everything_and_ends(tokenizer: Tokenizer) -> None:
    feeds = [Feed(tokenizer) for _ in range(3)]
    group = StreamGroup(feed.stream for feed in feeds)
    texts: list[str] = []

    async def scenario() -> None:
        reader = asyncio.create_task(_read_all(group, texts.append))
        for number, feed in enumerate(feeds):
            feed.tokens(b"a")
            await asyncio.sleep(0)
            feed.tokens(str(number).encode(), Finish("length"))
        await reader

    run(scenario())
    assert sorted("".join(texts)) == sorted("a0a1a2")


async def _read_all(group: StreamGroup, note: Callable[[str], None]) -> None:
    while pieces := await group.next_pieces():
        for piece in pieces:
            note(piece.text)


def test_without_a_tokenizer_there_are_ids_and_no_text() -> None:
    feed = Feed(None)
    feed.tokens(b"ab", Finish("length"))
    answer = result(feed)
    assert (answer.token_ids, answer.text) == (list(b"ab"), "")


def test_one_of_two_waiting_is_cancelled_and_the_other_gets_the_answer(tokenizer: Tokenizer) -> None:
    async def run() -> None:
        feed = Feed(tokenizer)
        first, second = (asyncio.create_task(feed.stream.result()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        feed.tokens([7, 8], Finish("length"))
        assert (await second).token_ids == [7, 8]
        assert first.cancelled()

    asyncio.run(run())


def test_a_pacer_wakes_in_order_and_lets_others_between() -> None:
    async def run() -> None:
        loop, pacer = asyncio.get_running_loop(), Pacer()
        waiters = [loop.create_future() for _ in range(5 * MAX_WAKES_PER_TURN)]
        for waiter in waiters:
            pacer.wake(waiter)
        waiters[3].cancel()
        counts = []
        while not all(waiter.done() for waiter in waiters):
            await asyncio.sleep(0)
            done = [waiter.done() for waiter in waiters]
            assert done == sorted(done, reverse=True) or not done[3]
            counts.append(sum(done))
        assert len(counts) >= 5 and all(b - a <= MAX_WAKES_PER_TURN for a, b in zip(counts, counts[1:], strict=False))
        late = loop.create_future()
        pacer.wake(late)
        await asyncio.wait_for(late, 10)

    asyncio.run(run())


def test_a_paced_group_gives_every_piece() -> None:
    async def run() -> None:
        feeds = [Feed(None), Feed(None)]
        group, seen = StreamGroup((feed.stream for feed in feeds), Pacer()), Counter[int]()
        for token in range(3):
            for feed in feeds:
                feed.tokens([token])
            while sum(seen.values()) < 2 * (token + 1):
                for piece in await group.next_pieces():
                    seen.update(piece.token_ids)
        for feed in feeds:
            feed.tokens([9], Finish("length"))
        while pieces := await group.next_pieces():
            for piece in pieces:
                seen.update(piece.token_ids)
        assert seen == {0: 2, 1: 2, 2: 2, 9: 2}

    asyncio.run(run())


def test_a_sequence_that_waits_is_few_containers(tokenizer: Tokenizer) -> None:
    """A full collection walks through them all, and everything else waits for it."""

    def on_end(stream: Stream, kind: EndKind) -> None:
        pass

    def waiting(number: int) -> Stream:
        params = SamplingParams(temperature=0.5)
        item = GenerateItem(input_ids=None, packed=pack_ids([1]), params=params)
        return Stream(item, Request(number, "r", pack_ids([1]), 8, 0), TextStart(tokenizer, params), on_end)

    waiting(0)
    gc.collect()
    before = len(gc.get_objects())
    streams = [waiting(number) for number in range(100)]
    gc.collect()
    assert (len(gc.get_objects()) - before) / len(streams) < 7.5  # with the parameters, that are one for many else


def test_a_group_of_very_many_gives_some_at_a_time_and_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "TURN_SECONDS", -1.0)  # as many as come before a look at the clock: one

    async def run() -> None:
        feeds = [Feed(None) for _ in range(3)]
        group, num_turns, sizes = StreamGroup(feed.stream for feed in feeds), 0, list[int]()

        async def others() -> None:
            nonlocal num_turns
            while True:
                await asyncio.sleep(0)
                num_turns += 1

        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        for feed in feeds:
            feed.tokens([7], Finish("length"))
        before = num_turns
        while pieces := await group.next_pieces():
            sizes.append(len(pieces))
        task.cancel()
        assert sizes == [1, 1, 1]
        assert num_turns - before >= 2

    asyncio.run(run())
