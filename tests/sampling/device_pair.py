"""Both samplers side by side: the device's is shown what the CPU's is shown, and everything they give is compared."""

from __future__ import annotations

import numpy as np
import torch

from headrace.sampling import Sampler
from headrace.sampling.device_sampler import RECORD_SIZE, DeviceSampler
from headrace.types.plan import PositionLogprobs, SamplePatch, SlotInit
from headrace.types.request import TokenSampling
from headrace.types.sampling_params import LogprobMode, LogprobOptions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES: tuple[LogprobMode, ...] = ("raw", "temperature", "sampled")
VOCAB = 4200
TOLERANCE = 2e-5


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def assert_same_extras(found: PositionLogprobs | None, expected: PositionLogprobs | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    assert found.top_ids.dtype == expected.top_ids.dtype
    assert_close(found.top_logprobs, expected.top_logprobs)
    assert_close(found.asked_logprobs, expected.asked_logprobs)
    np.testing.assert_array_equal(found.kept_ids, expected.kept_ids)
    np.testing.assert_array_equal(found.kept_counts, expected.kept_counts)
    assert found.kept_ids.dtype == expected.kept_ids.dtype == np.int32


class Pair:
    """Both samplers, shown the same sequences and steps; every step compares all that they give."""

    def __init__(self, vocab_size: int, max_slots: int, max_rows: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.cpu = Sampler(vocab_size, max_slots)
        self.device = DeviceSampler(vocab_size, max_slots, max_rows or max_slots + 2, DEVICE)
        self.paths: list[str] = []

    def enter(self, *inits: SlotInit) -> None:
        records = np.full((len(inits) + 1, RECORD_SIZE), -1, np.int32)
        for record, init in zip(records, inits, strict=False):
            self.cpu.enter(init)
            record[:] = self.device.enter(init)
        self.device.write_slots(torch.from_numpy(records).to(DEVICE))

    def step(
        self,
        logits: np.ndarray,
        slots: list[int],
        positions: list[int],
        padding: int = 2,
        patch: SamplePatch | None = None,
    ) -> np.ndarray:
        """Sample once; returns the tokens."""
        expected = self.cpu.sample(torch.from_numpy(logits), torch.tensor(slots), torch.tensor(positions), patch)
        num_rows, num_padded = len(slots), len(slots) + padding
        device_logits = torch.full((num_padded, self.vocab_size), float("nan"), device=DEVICE)
        device_logits[:num_rows] = torch.from_numpy(logits).to(DEVICE)
        device_slots = torch.tensor([*slots, *[-1] * padding], dtype=torch.int32, device=DEVICE)
        device_positions = torch.tensor([*positions, *[0] * padding], dtype=torch.int32, device=DEVICE)
        tokens = torch.full((num_padded,), -5, dtype=torch.int32, device=DEVICE)
        logprobs = torch.full((num_padded,), 5.0, device=DEVICE)
        arrays = np.array(slots, np.int32), np.array(positions, np.int32)
        path = self.device.path(*arrays)
        self.paths.append(path)
        given = device_logits, device_slots, device_positions, tokens, logprobs
        pending = None
        if path == "eager" or patch is not None:
            pending = self.device.sample_eager(*given, *arrays, patch=patch)
        else:
            self.device.sample(*given, plain=path == "plain")
        assert tokens[num_rows:].tolist() == [-5] * padding and logprobs[num_rows:].tolist() == [5.0] * padding
        np.testing.assert_array_equal(tokens[:num_rows].cpu().numpy(), expected.token_ids.numpy())
        assert_close(logprobs[:num_rows].cpu().numpy(), expected.logprobs.numpy())
        assert self.device.last_tokens[slots].tolist() == expected.token_ids.tolist()
        extras = pending.finish() if pending is not None else {}
        assert extras.keys() == expected.extras.keys()
        for row, extra in extras.items():
            assert_same_extras(extra, expected.extras[row])
        return expected.token_ids.numpy()

    def score(self, logits: np.ndarray, targets: np.ndarray, slot: int) -> None:
        values, extras = self.cpu.score(torch.from_numpy(logits), torch.from_numpy(targets), slot)
        pending = self.device.score(torch.from_numpy(logits).to(DEVICE), torch.from_numpy(targets).to(DEVICE), slot)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        found, found_extras = pending.finish()
        assert_close(found, values.numpy())
        assert_same_extras(found_extras, extras)


def make_init(
    slot: int,
    sampling: TokenSampling | None = None,
    *,
    seed: int | None = None,
    prompt: tuple[int, ...] = (3, 4, 5, 5),
    output: tuple[int, ...] = (),
    mode: LogprobMode = "temperature",
    prompt_mode: LogprobMode = "raw",
    num_top: int = 0,
    asked: tuple[int, ...] = (),
    stop_ids: tuple[int, ...] = (),
    min_length: int = 0,
    max_kept: int = 0,
) -> SlotInit:
    return SlotInit(
        slot=slot,
        seed=slot * 7919 + 1 if seed is None else seed,
        num_prompt_tokens=len(prompt),
        token_ids=np.array(prompt + output, np.int32),
        sampling=sampling or TokenSampling(),
        logprobs=LogprobOptions(mode, prompt_mode, None, num_top, asked, max_kept),
        stop_token_ids=stop_ids,
        min_length=min_length,
    )


def normal(num_rows: int, seed: int, vocab_size: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab_size)) * 3.0).astype(np.float32)
