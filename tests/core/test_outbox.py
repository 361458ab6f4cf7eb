"""Deltas on a link whose reader is slow: joined, none lost, and never overtaken by a reply."""

from __future__ import annotations

import random

import numpy as np

from headrace.core.outbox import joined
from headrace.engine.sample import Sample
from headrace.types.messages import Deltas, GetStatus, Reply, Submit
from headrace.types.request import Delta, Finish, RoutedPart, TokenExtras, pack_ids
from headrace.types.sampling_params import LogprobOptions
from tests.core.harness import Core, request

OPTIONS = LogprobOptions(prompt_start=0, num_top=2, token_ids=(7, 8, 9), max_kept=99, routed_start=0)


def floats(source: random.Random, count: int) -> bytes:
    return np.array([source.random() for _ in range(count)], np.float32).tobytes()


def extras(source: random.Random, count: int) -> TokenExtras:
    counts = [source.randrange(4) for _ in range(count)]
    return TokenExtras(
        pack_ids([source.randrange(99) * 2 + i % 2 for i in range(2 * count)]),
        floats(source, 2 * count),
        floats(source, 3 * count),
        pack_ids(counts),
        pack_ids([source.randrange(99) for _ in range(sum(counts))]),
    )


def life(source: random.Random, handle: int) -> list[Delta]:
    """Every delta of one sequence, as a core may send it."""
    found = []
    for number in range(source.randrange(1, 6)):
        count = source.randrange(4)
        has_scores = number == 0
        found.append(
            Delta(
                handle,
                pack_ids([source.randrange(99) for _ in range(count)]),
                floats(source, count),
                ((source.choice("ab"), count),) if count else (),
                num_cached_tokens=source.randrange(3),
                num_preemptions=number,
                extras=extras(source, count) if count else TokenExtras(),
                prompt_logprobs=floats(source, 5) if has_scores else b"",
                prompt_extras=extras(source, 5) if has_scores else TokenExtras(),
                span_epochs=(source.randrange(2),) if count else (),
                prompt_spans=(("a", 2), ("b", 3)) if has_scores else (),
                routed=RoutedPart(3, 2, source.randbytes(12 * count)) if count else RoutedPart(),
                times=(1.0, 0.0) if has_scores else (),
            )
        )
    return [*found, Delta(handle, finish=Finish("stop", matched=3), times=(1.0, 2.0))]


def test_joined_deltas_say_what_they_said_apart() -> None:
    source = random.Random(0)
    for _ in range(200):
        lives = {handle: life(source, handle) for handle in range(3)}
        order = [handle for handle, deltas in lives.items() for _ in deltas]
        source.shuffle(order)
        left = {handle: iter(deltas) for handle, deltas in lives.items()}
        deltas = [next(left[handle]) for handle in order]
        cut = source.randrange(len(deltas))
        sent = [*joined(joined(deltas[:cut]) + deltas[cut:])]
        assert len(sent) == 3
        for handle, parts in lives.items():
            apart, whole = (Sample(request(handle, logprobs=OPTIONS)) for _ in range(2))
            for delta in parts:
                apart.append(delta)
            (delta,) = [each for each in sent if each.handle == handle]
            whole.append(delta)
            assert delta.finish == parts[-1].finish
            assert (whole.token_ids, whole.logprobs, whole.spans) == (apart.token_ids, apart.logprobs, apart.spans)
            assert whole.more_from(0) == apart.more_from(0)
            counts = [(each.num_cached_tokens, each.num_preemptions) for each in (whole, apart)]
            assert counts[0] == counts[1]
            assert whole.prompt_fields() == apart.prompt_fields()
            assert whole.routed_experts() == apart.routed_experts()
            assert whole.times == apart.times == (1.0, 2.0)


def test_a_slow_reader_gets_fewer_deltas_and_a_reply_overtakes_none() -> None:
    core = Core()
    core.send(*(Submit((request(handle, max_new_tokens=12, deliver_every=1),)) for handle in range(4)))
    core.turn(2)
    core.link.is_behind = True
    core.link.outputs.clear()
    core.turn(5)
    assert core.link.outputs == []
    core.send(GetStatus(1))
    core.turn()
    deltas, reply = core.link.outputs[:2]
    assert isinstance(deltas, Deltas) and isinstance(reply, Reply)
    assert len(deltas.deltas) == 4 and all(len(delta.token_ids) >= 5 * 4 for delta in deltas.deltas)
    core.settle()
    for sent in core.link.deltas.values():
        assert sum(len(delta.token_ids) for delta in sent) == 12 * 4
        assert sent[-1].finish is not None
