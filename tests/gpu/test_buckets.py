"""Updates in buckets from a trainer of another process on the same device, whose memory is opened there."""

from __future__ import annotations

import pytest

from headrace import serve
from tests.gpu.builders import Checkpoints, Starter
from tests.server.test_buckets import Client


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("style", ["slime", "verl"])
def test_buckets_end_as_a_cold_load(start: Starter, checkpoints: Checkpoints, style: str, device: str) -> None:
    old, new = checkpoints.get(), checkpoints.get(seed=1)
    cold = start(new)
    expected = {"new": cold.digest()}
    cold.shutdown()
    engine = start(old)
    expected["old"] = engine.digest()
    handle = serve(engine)
    client = Client(handle.url, style, {"new": new.folder, "old": old.folder}, device=device)
    try:
        for digest in expected.values():
            found = client.replies()
            assert [status for _, status, _ in found] == [200] * len(found), found
            assert engine.digest() == digest
            client.go_on()
        client.end()
    finally:
        client.process.kill()
        handle.stop()
