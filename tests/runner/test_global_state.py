"""A core in the trainer's process: none of torch's global settings changes a value, and none is changed."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from headrace import Engine, InternalError
from headrace.kernels.products import PLAIN, Products, direct_products
from headrace.layers.norm import Normed, RmsNorm
from headrace.layers.residual import Residual
from headrace.runner.exact_products import ExactProducts, WatchedProducts
from headrace.runner.runner import Runner
from headrace.runner.slots import InputTable
from headrace.types.plan import StepDisturbed
from tests.engine.builders import SETTINGS, save_model
from tests.parity.models import make_model
from tests.parity.models import save_model as save_experts

PROMPTS = [[index % 90 + 1 for index in range(length)] for length in (3, 17, 40, 90)]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.01},
    {"presence_penalty": 0.5, "logit_bias": {7: 1.5}},
    {"temperature": 0.0, "top_p": 0.9},
]
MKLDNN: Any = torch.backends.mkldnn
EXACT = ExactProducts(torch.device("cpu"))
Values = list[tuple[list[int], list[float], list[float | None]]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    folder = save_model(tmp_path_factory.mktemp("model"), seed=0)
    settings: dict[str, Any] = {**SETTINGS, "device": "cpu", "inprocess": True, "skip_tokenizer_init": True}
    variants: dict[str, dict[str, Any]] = {
        "fast": {},
        "invariant": {"numerics": "invariant"},
        "reference": {"attention_backend": "reference"},
    }
    started = {name: Engine(folder, **settings, **more) for name, more in variants.items()}
    experts = save_experts(make_model("mixtral"), tmp_path_factory.mktemp("experts"))
    started |= {f"{name} experts": Engine(experts, **settings, **more) for name, more in variants.items()}
    yield started
    for engine in started.values():
        engine.shutdown()


def values(engine: Engine) -> Values:
    params: list[Any] = [{"max_new_tokens": 6, "ignore_eos": True, "seed": 5, **each} for each in PARAMS]
    engine.flush_cache()
    engine.pause()  # behind which all prompts wait, to come into the same steps every time
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            engine.generate, input_ids=PROMPTS, sampling_params=params, return_prompt_logprobs=True, top_logprobs=2
        )
        while engine.status().num_waiting < len(PROMPTS):
            assert not asked.done()
        engine.resume()
        found = asked.result()
    return [(each.token_ids, each.logprobs, each.prompt_logprobs) for each in found]


@pytest.fixture(scope="module")
def plain_values(engines: dict[str, Engine]) -> dict[str, Values]:
    """What each engine computes under no setting of anybody's."""
    return {name: values(engine) for name, engine in engines.items()}


@contextmanager
def kept() -> Iterator[None]:
    """Put back what a case changes."""
    dtype, precision, deterministic, floating = (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        np.geterr(),
    )
    always, invariants = torch.is_warn_always_enabled(), torch.sparse.check_sparse_tensor_invariants
    checks = invariants.is_enabled()
    is_allowed = [is_enabled() for is_enabled, _ in ATTENTION]
    try:
        yield
    finally:
        torch.set_warn_always(always)
        (invariants.enable if checks else invariants.disable)()
        torch.autograd.set_detect_anomaly(False)
        for (_, enable), was in zip(ATTENTION, is_allowed, strict=True):
            enable(was)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        np.seterr(**floating)


def shorten_matmul() -> None:
    MKLDNN.matmul.fp32_precision = "bf16"


CUDA: Any = torch.backends.cuda
ATTENTION = [(getattr(CUDA, f"{name}_sdp_enabled"), getattr(CUDA, f"enable_{name}_sdp")) for name in ("flash", "math")]


def raise_every_warning() -> None:
    torch.set_warn_always(True)
    warnings.simplefilter("error")


def forbid_attention(*ways: int) -> None:
    for way in ways:
        ATTENTION[way][1](False)


CASES: dict[str, Callable[[], object]] = {
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "short products": shorten_matmul,
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "numpy errors": lambda: np.seterr(all="raise"),
    "warnings": lambda: warnings.simplefilter("error"),
    "every warning": raise_every_warning,
    "no flash attention": lambda: forbid_attention(0),
    "no attention": lambda: forbid_attention(0, 1),
    "sparse invariants": lambda: torch.sparse.check_sparse_tensor_invariants.enable(),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
}


PRODUCTS = ("medium", "high", "short products", "deterministic")
TRIED = [
    (case, variant, experts)
    for number, case in enumerate(CASES)
    for row, variant in enumerate(("fast", "invariant", "reference"))
    for column, experts in enumerate(("", " experts"))
    if case in PRODUCTS or (number + row + column) % 2 == 0
]
"""What products look at with all engines, the rest with every other one: every kernel meets every case."""


def settings_now() -> list[object]:
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        MKLDNN.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    ]


@pytest.mark.parametrize(("case", "variant", "experts"), TRIED)
def test_no_global_setting_changes_a_value_or_is_changed(
    engines: dict[str, Engine], plain_values: dict[str, Values], variant: str, experts: str, case: str
) -> None:
    variant += experts
    expected = plain_values[variant]
    with kept(), warnings.catch_warnings():
        CASES[case]()
        before = settings_now()
        assert values(engines[variant]) == expected
        assert settings_now() == before


def test_an_engine_is_built_under_any_setting(engines: dict[str, Engine]) -> None:
    expected, digest = values(engines["fast"]), engines["fast"].digest()
    with kept():
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        settings: dict[str, Any] = {**SETTINGS, "device": "cpu", "inprocess": True, "skip_tokenizer_init": True}
        with Engine(engines["fast"].config.model, **settings) as engine:
            assert engine.digest() == digest and values(engine) == expected
            assert torch.get_float32_matmul_precision() == "medium" and torch.get_default_dtype() == torch.bfloat16


def test_settings_that_flicker_in_another_thread_change_no_value(engines: dict[str, Engine]) -> None:
    """As a trainer that loads a model does: for a moment, at any time."""
    expected = values(engines["invariant"])
    is_over = threading.Event()

    def flicker() -> None:
        torch.set_float32_matmul_precision("medium")  # in the middle of some step, as likely as not
        while not is_over.is_set():
            torch.set_default_dtype(torch.bfloat16)
            is_over.wait(0.001)
            torch.set_default_dtype(torch.float32)
            is_over.wait(0.001)

    thread = threading.Thread(target=flicker)
    with kept():
        thread.start()
        try:
            found = [values(engines["invariant"]) for _ in range(5)]
        finally:
            is_over.set()
            thread.join()
    assert found == [expected] * 5
    assert engines["invariant"].is_alive


def test_a_precision_changed_between_products_changes_no_value(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There and back before the step ends: nothing could be seen of it then."""
    real = Residual.normed

    def normed(self: Residual, norm: RmsNorm) -> Normed:
        torch.set_float32_matmul_precision("medium")
        return real(self, norm)

    for engine in engines.values():
        expected, real_sample = values(engine), Runner._finish
        failed_before = engine.metrics()["num_failed_steps"]

        def sample(self: Runner, *args: Any, _real: Any = real_sample) -> Any:
            found = _real(self, *args)
            torch.set_float32_matmul_precision("highest")
            return found

        with kept(), monkeypatch.context() as patch:
            patch.setattr(Residual, "normed", normed)
            patch.setattr(Runner, "_finish", sample)
            patch.setattr(InputTable, "apply", shortened(InputTable.apply))
            assert values(engine) == expected
        assert engine.metrics()["num_failed_steps"] == failed_before


def shortened(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, behind a change of the setting."""

    def call(*args: Any) -> Any:
        torch.set_float32_matmul_precision("medium")
        return method(*args)

    return call


def test_a_core_on_a_cpu_never_touches_the_setting(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    with kept():
        torch.set_float32_matmul_precision("medium")
        seen, real = [], Runner._finish

        def sample(*args: Any) -> Any:
            seen.append(MKLDNN.matmul.fp32_precision)
            return real(*args)

        monkeypatch.setattr(Runner, "_finish", sample)
        values(engines["fast"])
        assert set(seen) == {"bf16"}


SIZES = [(1, 64, 48), (2, 16, 5), (16, 130, 70), (37, 512, 1536), (200, 33, 7), (0, 8, 8)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["direct", "watched"])
def test_products_beside_a_trainer_have_the_bits_of_those_alone(kind: str, size: tuple[int, int, int]) -> None:
    num_rows, num_inputs, num_outputs = size
    x, weight, target = torch.randn(num_rows, num_inputs), torch.randn(num_outputs, num_inputs), torch.randn(size[::2])
    bias = torch.randn(num_outputs)
    watched = WatchedProducts(EXACT, is_repeatable=True)
    products = watched if kind == "watched" else direct_products() or watched

    def found(products: Products) -> list[torch.Tensor]:
        out, added = torch.empty_like(target), target.clone()
        products.linear_out(x, weight, out)
        products.linear_add_(added, x, weight, None)
        return [out, added, products.linear(x, weight, None), products.linear(x, weight, bias)]

    expected = found(PLAIN)
    with kept():
        torch.set_float32_matmul_precision("medium")
        with EXACT if products is watched else nullcontext():
            assert all(torch.equal(*pair) for pair in zip(found(products), expected, strict=True))
        assert torch.get_float32_matmul_precision() == "medium" and MKLDNN.matmul.fp32_precision == "bf16"


@pytest.mark.parametrize("call", ["linear", "linear_out", "linear_add_"])
def test_a_watched_product_is_computed_again_until_nothing_changed_in_it(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, last = torch.randn(8, 64), torch.randn(32, 64), torch.zeros(8, 32)
    expected, tries = x @ weight.t(), []
    real: Callable[..., Any] = getattr(Products, call)

    def flip(*args: Any) -> Any:
        tries.append(MKLDNN.matmul.fp32_precision)
        torch.set_float32_matmul_precision("highest" if len(tries) == 3 else "medium")
        return real(*args)

    monkeypatch.setattr(Products, call, flip)
    products = WatchedProducts(EXACT, is_repeatable=True)
    arguments = {"linear": (x, weight, None), "linear_out": (x, weight, last), "linear_add_": (last, x, weight, None)}[
        call
    ]
    with kept(), EXACT:
        found = getattr(products, call)(*arguments)
        assert torch.equal(last if found is None else found, expected) and len(tries) == 3
        assert not set(tries) & {"bf16"}, "each try begins with exact products"
        with pytest.raises(StepDisturbed):
            getattr(WatchedProducts(EXACT, is_repeatable=False), call)(*arguments)


def test_a_step_that_is_disturbed_again_and_again_is_an_error_at_last(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def disturbed(*_: Any) -> Any:
        raise StepDisturbed("the precision of float32 products was changed while a step was computed")

    engine = engines["fast"]
    monkeypatch.setattr(Runner, "launch", disturbed)
    with pytest.raises(InternalError, match="precision of float32 products"):
        engine.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 2})
    monkeypatch.undo()
    assert engine.is_alive and engine.generate(input_ids=[1, 2], sampling_params={"max_new_tokens": 2})
    assert sum("is computed again" in record.message for record in caplog.records) == 1


def test_a_setting_made_during_a_step_is_not_undone_by_its_end() -> None:
    with kept():
        torch.set_float32_matmul_precision("medium")
        with ExactProducts(torch.device("cpu")):
            assert MKLDNN.matmul.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == "medium", "who asks meanwhile hears of nothing"
            torch.set_float32_matmul_precision("highest")
        assert torch.get_float32_matmul_precision() == "highest"


def test_no_global_generator_is_drawn_from_or_seeded(engines: dict[str, Engine]) -> None:
    torch_state, python_state, numpy_state = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
    for engine in engines.values():
        values(engine)
    settings: dict[str, Any] = {**SETTINGS, "inprocess": True, "skip_tokenizer_init": True, "load_format": "dummy"}
    Engine(engines["fast"].config.model, **settings).shutdown()
    assert torch.equal(torch_state, torch.random.get_rng_state()) and python_state == random.getstate()
    assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # type: ignore[index]


def test_a_model_without_float32_leaves_the_setting_alone() -> None:
    exact = ExactProducts(torch.device("cpu"), is_shared=True, has_float32=False)
    assert exact.products is PLAIN
    with kept():
        torch.set_float32_matmul_precision("medium")
        with exact.guard:
            assert torch.get_float32_matmul_precision() == "medium" and MKLDNN.matmul.fp32_precision == "bf16"
