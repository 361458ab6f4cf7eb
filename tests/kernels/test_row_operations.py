"""Each row operation against its oracle, and the invariant ones bit for bit in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from headrace.config import RopeSpec
from headrace.kernels import KernelSet, invariant, select_kernels
from headrace.kernels.products import PLAIN, Products
from headrace.kernels.rope_tables import rope_tables
from headrace.types.errors import ConfigError

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Operation = Callable[[KernelSet, Tensor], Tensor]


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operations(dtype: torch.dtype, width: int) -> dict[str, Operation]:
    """Each operation as a function of rows [T, width]."""
    weight, bias = random(77, width, dtype=dtype, seed=1) / width**0.5, random(77, dtype=dtype, seed=2)
    residual = random(600, 77, dtype=dtype, seed=3)
    norm = random(width, dtype=dtype, seed=4)
    heads = width // 8
    cos, sin = rope_tables(RopeSpec(), 8, 600, dtype)

    def linear_add(kernels: KernelSet, x: Tensor) -> Tensor:
        total = residual[:1].repeat(x.shape[0], 1)
        kernels.linear_add_(total, x, weight, bias)
        return total

    def rope(kernels: KernelSet, x: Tensor) -> Tensor:
        positions = torch.full((x.shape[0],), 311)
        return kernels.rope(x.view(-1, heads, 8), cos[positions], sin[positions]).flatten(1)

    return {
        "linear": lambda kernels, x: kernels.linear(x, weight, None),
        "linear with bias": lambda kernels, x: kernels.linear(x, weight, bias),
        "linear_add_": linear_add,
        "rms_norm": lambda kernels, x: kernels.rms_norm(x, norm, 1e-6),
        "rms_norm of heads": lambda kernels, x: kernels.rms_norm(x.view(-1, heads, 8), norm[:8], 1e-6).flatten(1),
        "rope": rope,
        "silu_and_mul": lambda kernels, x: kernels.silu_and_mul(x),
    }


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["fast", "invariant"])
@pytest.mark.parametrize("num_tokens", [1, 16, 37])
def test_against_the_oracle(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    oracle, kernels = select_kernels("reference"), select_kernels(name)
    x = random(num_tokens, 176, dtype=dtype, seed=5)
    for label, run in operations(dtype, 176).items():
        expected, found = run(oracle, x), run(kernels, x)
        assert found.dtype == dtype and found.shape == expected.shape, label
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < TOLERANCES[dtype], f"{label}: {error}"


@pytest.mark.parametrize("width", [40, 1000, 2560])
def test_invariant_rows_have_the_same_bits_in_any_batch(width: int, num_threads: int) -> None:
    kernels = select_kernels("invariant")
    x = random(33, width, seed=6)
    generator = torch.Generator().manual_seed(width)
    for label, run in operations(torch.float32, width).items():
        alone = torch.cat([run(kernels, x[row : row + 1]) for row in range(33)])
        for num_rows in (2, 7, 15, 16, 17, 33):
            order = torch.randperm(33, generator=generator)[:num_rows]
            assert torch.equal(run(kernels, x[order]), alone[order]), f"{label}, {num_rows} rows"


def test_invariant_rows_have_the_same_bits_at_any_address() -> None:
    kernels = select_kernels("invariant")
    x = random(40, 40, seed=10)
    for label, run in operations(torch.float32, 40).items():
        whole = run(kernels, x)
        for first, last in ((1, 17), (3, 35), (7, 23), (9, 10)):
            assert torch.equal(run(kernels, x[first:last]), whole[first:last]), f"{label}, rows {first} to {last}"


class SeenProducts(Products):
    """Notes of each product how many rows it has and where they begin in memory."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []

    def linear_out(self, x_TI: Tensor, weight_OI: Tensor, out_TO: Tensor) -> None:
        self.seen.append((x_TI.shape[0], x_TI.data_ptr() % 64, x_TI.is_contiguous()))
        super().linear_out(x_TI, weight_OI, out_TO)


def test_every_invariant_product_is_of_as_many_rows_at_a_cache_line() -> None:
    """Which kernel is taken for others is another matter on each machine."""
    products, weight = SeenProducts(), random(7, 40)
    inputs = random(70, 120)
    for first in (0, 1, 3):  # rows of 160 bytes are mostly at none
        for num_rows in (1, 15, 16, 17, 32, 48):
            rows = slice(first, first + num_rows)
            for x in (inputs[:, :40].contiguous()[rows], inputs[rows, :40], inputs[rows, 3:43], inputs[rows, 80:]):
                found = invariant.linear(x, weight, None, products)
                torch.testing.assert_close(found, x @ weight.t(), atol=1e-4, rtol=1e-4)
    assert set(products.seen) == {(16, 0, True)}


@pytest.mark.parametrize("num_features", [8, 1000, 4096, 32736, 32737, 40001])
def test_the_gates_exp_runs_on_blocks_that_torch_does_not_split(
    num_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would at 32,768 elements; and a block begins where a vector does, in each row alike."""
    blocks: list[Tensor] = []

    class Functional:
        """The one function of torch's that is used there."""

        @staticmethod
        def silu(x: Tensor) -> Tensor:
            blocks.append(x)
            return torch.nn.functional.silu(x)

    monkeypatch.setattr(invariant, "F", Functional)
    x = random(9, 2 * num_features)
    invariant.silu_and_mul(x)
    columns = {(block.storage_offset() % (2 * num_features)) % 32 for block in blocks}
    assert columns == {0} and sum(block.numel() for block in blocks) == 9 * num_features
    assert max(block.numel() for block in blocks) < 32768 and len(blocks) <= 9 * (1 + num_features // 32736)


def test_rows_too_wide_for_one_unsplit_block() -> None:
    kernels = select_kernels("invariant")
    x = random(3, 2 * 40001, seed=7)
    found = kernels.silu_and_mul(x)
    alone = torch.cat([kernels.silu_and_mul(x[row : row + 1]) for row in range(3)])
    assert torch.equal(found, alone)
    assert (found - select_kernels("reference").silu_and_mul(x)).abs().max() < 1e-5


def test_the_fast_gemm_is_not_invariant() -> None:
    """Why the invariant family exists; if this ever fails, the plain GEMM could serve both."""
    x, weight = random(64, 1024, seed=8), random(512, 1024, seed=9)
    assert not torch.equal(PLAIN.linear(x[:1], weight, None), PLAIN.linear(x, weight, None)[:1])


def test_linear_and_llama3_frequencies() -> None:
    plain_cos, _ = rope_tables(RopeSpec(), 16, 40, torch.float32)
    linear_cos, _ = rope_tables(RopeSpec(scaling="linear", factor=4.0), 16, 160, torch.float32)
    torch.testing.assert_close(linear_cos[::4], plain_cos, atol=1e-6, rtol=0)
    spec = RopeSpec(theta=1e4, scaling="llama3", factor=8.0, original_max_position=64)
    _, plain_sin = rope_tables(RopeSpec(), 16, 3, torch.float32)
    _, scaled_sin = rope_tables(spec, 16, 3, torch.float32)
    assert scaled_sin[1, 0] == plain_sin[1, 0], "short wavelengths are kept"
    torch.testing.assert_close(scaled_sin[1, 7], plain_sin[1, 7] / 8.0, atol=1e-9, rtol=1e-3)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="numerics"):
        select_kernels("exact")
