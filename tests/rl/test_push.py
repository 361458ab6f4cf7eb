"""Pushing weights: names, tied heads, and the proof that what was sent is live."""

from __future__ import annotations

import enum
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from transformers import Qwen3ForCausalLM

from headrace.engine import Engine
from headrace.rl.demo import POLICY, checkpoint_digests
from headrace.rl.push import WeightPusher, push_weights, tensor_digests
from headrace.rl.sources import hf_name, hf_named_tensors
from headrace.types.errors import WeightUpdateError


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(model=str(POLICY), inprocess=True, num_threads=1, max_running_requests=4, context_length=64) as engine:
        yield engine


@pytest.fixture()
def model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "module.model.layers.0.mlp.up_proj.weight",
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
    ],
)
def test_wrappers_leave_names(name: str) -> None:
    assert hf_name(name) == "model.layers.0.mlp.up_proj.weight"


def test_names_are_those_of_the_checkpoint_and_the_tied_head_is_left_out(model: Qwen3ForCausalLM) -> None:
    assert "lm_head.weight" in model.state_dict()
    names = [name for name, _ in hf_named_tensors(torch.nn.ModuleDict({"module": model}))]
    assert sorted(names) == sorted(load_file(POLICY / "model.safetensors"))


def test_an_untied_head_is_sent() -> None:
    embedding, head = torch.ones(4, 2), torch.ones(4, 2)
    names = [name for name, _ in hf_named_tensors({"model.embed_tokens.weight": embedding, "lm_head.weight": head})]
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]


def test_tensors_are_not_copied(model: Qwen3ForCausalLM) -> None:
    sent = dict(hf_named_tensors(model))
    assert sent["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert not sent["model.norm.weight"].requires_grad


@pytest.mark.parametrize("weights", [None, 5, torch.ones(2), [("a", torch.ones(2))], {3: torch.ones(2)}])
def test_what_is_no_model_is_refused_by_name(weights: Any) -> None:
    with pytest.raises(WeightUpdateError) as caught:
        hf_named_tensors(weights)
    assert caught.value.field == "weights"


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight"):
        hf_named_tensors({"model.norm.weight": torch.ones(2), "module.model.norm.weight": torch.ones(2)})


def test_digests_of_a_tensor_are_of_its_bytes_in_the_asked_dtype() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7
    (as_float,) = tensor_digests([("w", tensor)], "float32").values()
    (as_half,) = tensor_digests([("w", tensor)], "bfloat16").values()
    assert as_float != as_half
    assert tensor_digests([("w", tensor.t().contiguous().t())], "float32") == {"w": as_float}
    assert tensor_digests([("w", tensor.bfloat16())], "bfloat16") == {"w": as_half}


@pytest.mark.parametrize("dtype", ["nonsense", "int8", "float64", "Tensor", None, 5])
def test_digests_are_refused_in_a_dtype_that_no_engine_holds(dtype: Any) -> None:
    with pytest.raises(WeightUpdateError) as caught:
        tensor_digests([("w", torch.ones(2))], dtype)
    assert caught.value.field == "dtype"


@pytest.mark.parametrize(
    ("pairs", "field"),
    [
        (None, "named_tensors"),
        ([5], "named_tensors"),
        ([(3, torch.ones(2))], "named_tensors"),
        ([("w", 5)], "w"),
        ([("w", np.ones(2))], "w"),
        ([("w", torch.ones(2, device="meta"))], "w"),
        ([("w", torch.ones(2).to_sparse())], "w"),
        ([("w", torch.ones(2, dtype=torch.complex64))], "w"),
    ],
)
def test_what_has_no_digest_is_refused_by_name(pairs: Any, field: str) -> None:
    with pytest.raises(WeightUpdateError) as caught:
        tensor_digests(pairs, "float32")
    assert caught.value.field == field


def test_a_push_makes_the_weights_live_and_proves_it(engine: Engine, model: Qwen3ForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    report = push_weights(engine, model, "tuned", verify=True)
    assert report.is_verified and report.update.version == "tuned" and report.update.pause_ms >= 0
    changed = {name for name, digest in engine.digest().items() if digest != checkpoint_digests(POLICY)[name]}
    assert changed == {"model.layers.1.self_attn.k_proj.weight"}
    read = engine.get_weights_by_name("model.layers.1.self_attn.k_proj.weight")
    assert torch.equal(read, model.model.layers[1].self_attn.k_proj.weight)


class Label(str, enum.Enum):  # noqa: UP042  (`str()` of a `StrEnum` would be its value)
    SEVEN = "seven"


@pytest.mark.parametrize(
    ("version", "label"),
    [(np.int64(3), "3"), (torch.tensor(5), "5"), (np.array(6), "6"), (Label.SEVEN, "seven"), (np.str_("n"), "n")],
)
def test_a_label_of_any_kind_is_the_one_reported(
    engine: Engine, model: Qwen3ForCausalLM, version: Any, label: str
) -> None:
    assert push_weights(engine, model, version).update.version == label == engine.version


def test_a_refused_push_names_the_tensor_and_leaves_the_old_weights(engine: Engine, model: Qwen3ForCausalLM) -> None:
    before = engine.digest()
    state = {**model.state_dict(), "model.norm.weight": torch.ones(63)}
    with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight"):
        push_weights(engine, state, "broken")
    assert engine.digest() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_copies_is_verified_too(engine: Engine, model: Qwen3ForCausalLM, dtype: torch.dtype) -> None:
    """Its tied head is a tensor of its own."""
    copies = {name: tensor.to(dtype, copy=True) for name, tensor in model.state_dict().items()}
    assert copies["lm_head.weight"].data_ptr() != copies["model.embed_tokens.weight"].data_ptr()
    assert push_weights(engine, copies, str(dtype), verify=True).is_verified
    copies["lm_head.weight"] += 1
    with pytest.raises(WeightUpdateError, match=r"lm_head\.weight"):
        push_weights(engine, copies, "untied", verify=True)
    push_weights(engine, model, "again", verify=True)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A group of one process."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
def test_dtensors_that_are_whole_are_pushed(
    engine: Engine, model: Qwen3ForCausalLM, mesh: DeviceMesh, placement: Placement
) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.25)
    state = {name: distribute_tensor(tensor, mesh, [placement]) for name, tensor in model.state_dict().items()}
    assert push_weights(engine, state, "distributed", verify=True).is_verified
    assert torch.equal(engine.get_weights_by_name("model.norm.weight"), model.model.norm.weight)
    assert engine.update_weights_from_tensor(state, "again").num_tensors == len(state)


def test_a_dtensor_of_which_others_hold_a_part_is_refused_by_name(mesh: DeviceMesh) -> None:
    class Wider(DeviceMesh):
        """The same mesh, as one of two ranks sees it."""

        def size(self, mesh_dim: int | None = None) -> int:
            return 2

    part = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    part._spec.mesh.__class__ = Wider
    try:
        with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight is a DTensor of 2 ranks"):
            hf_named_tensors({"model.norm.weight": part})
    finally:
        mesh.__class__ = DeviceMesh


def untied_copy(folder: Path) -> Path:
    """The policy with a head of its own, which holds the embedding's values."""
    model = Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POLICY / file, folder / file)
    return folder


def test_a_trainer_that_ties_fills_an_engine_that_does_not(tmp_path: Path, model: Qwen3ForCausalLM) -> None:
    settings = {"inprocess": True, "num_threads": 1, "context_length": 64}
    with Engine(model=str(untied_copy(tmp_path)), **settings) as engine:  # type: ignore[arg-type]
        assert not engine.resolved.model.tie_word_embeddings
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.5)
        assert push_weights(engine, model, "tied", verify=True).is_verified
        assert torch.equal(engine.get_weights_by_name("lm_head.weight"), model.model.embed_tokens.weight)
        assert engine.update_weights_from_tensor(model.state_dict(), "pairs").version == "pairs"


def test_a_trainer_that_does_not_tie_is_refused_by_an_engine_that_does(engine: Engine, model: Qwen3ForCausalLM) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    for send in (push_weights, Engine.update_weights_from_tensor):
        with pytest.raises(WeightUpdateError, match=r"lm_head\.weight is tied to"):
            send(engine, state, "untied")


def test_buffers_and_freed_and_missing_memory(engine: Engine, model: Qwen3ForCausalLM) -> None:
    state: dict[str, Any] = {**model.state_dict(), "model.rotary_emb.inv_freq": torch.ones(8)}
    assert push_weights(engine, state, "with buffers", verify=True).is_verified
    norm = torch.ones_like(state["model.norm.weight"])
    norm.untyped_storage().resize_(0)
    for bad in (norm, torch.ones(3, device="meta"), None, [1.0]):
        broken: dict[str, Any] = {**state, "model.norm.weight": bad}
        with pytest.raises(WeightUpdateError, match=r"model\.norm\.weight"):
            push_weights(engine, broken, "never")


def test_a_push_lets_the_trainer_free_its_memory_afterwards(engine: Engine, model: Qwen3ForCausalLM) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    push_weights(engine, state, "before", verify=True)
    for tensor in state.values():
        tensor.untyped_storage().resize_(0)


def test_verification_names_the_tensor_that_is_not_what_was_sent(model: Qwen3ForCausalLM) -> None:
    class Forgetful(Engine):
        """An engine that takes an update and keeps one old tensor."""

        def digest(self) -> dict[str, str]:
            return {**super().digest(), "model.norm.weight": "0" * 64}

    named = pytest.raises(WeightUpdateError, match=r"1 tensors: model\.norm\.weight")
    with Forgetful(model=str(POLICY), inprocess=True, num_threads=1, context_length=64) as engine, named:
        push_weights(engine, model, "tuned", verify=True)


@pytest.mark.parametrize("flag", ["yes", 1, None])
def test_a_flag_that_is_none_is_refused_before_anything_is_pushed(
    engine: Engine, model: Qwen3ForCausalLM, flag: Any
) -> None:
    before = engine.version
    with pytest.raises(WeightUpdateError) as caught:
        push_weights(engine, model, "flags", verify=flag)
    assert caught.value.field == "verify" and engine.version == before
    with pytest.raises(WeightUpdateError) as caught:
        hf_named_tensors(model, keep_tied_head=flag)
    assert caught.value.field == "keep_tied_head"


def test_an_iterator_may_fill_one_buffer_again(engine: Engine, model: Qwen3ForCausalLM) -> None:
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    buffer = torch.empty(max(tensor.numel() for tensor in state.values()))

    def streamed() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in state.items():
            yield f"module.{name}", buffer[: tensor.numel()].view(tensor.shape).copy_(tensor * 1.5)

    assert WeightPusher(engine).push(streamed(), "streamed", verify=True).update.num_tensors == len(state)
    assert engine.digest() == tensor_digests([(name, each * 1.5) for name, each in state.items()], "float32")


@pytest.mark.parametrize(("change", "named"), [("missing", "model.norm.weight"), ("unknown", "nobody")])
def test_what_an_iterator_lacks_or_invents_is_named(
    engine: Engine, model: Qwen3ForCausalLM, change: str, named: str
) -> None:
    before, state = engine.digest(), dict(model.state_dict())
    norm = state.pop("model.norm.weight")
    if change == "unknown":
        state |= {"model.norm.weight": norm, "nobody": norm}
    with pytest.raises(WeightUpdateError) as caught:
        WeightPusher(engine).push(iter(state.items()), change)
    assert caught.value.field == named and engine.digest() == before
    assert WeightPusher(engine).push(model, "whole").update.version == "whole"


def test_an_iterator_that_fails_leaves_no_session(engine: Engine, model: Qwen3ForCausalLM) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(model.state_dict().items())[:3]
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="own"):
        WeightPusher(engine).push(failing(), "never")
    assert WeightPusher(engine).push(model, "after").update.version == "after"


def test_only_rank_0_has_a_target_and_it_is_an_engine_or_a_client(engine: Engine) -> None:
    wrong: Any = "http://127.0.0.1"
    for target in (wrong, None):
        with pytest.raises(WeightUpdateError) as caught:
            WeightPusher(target)
        assert caught.value.field == "target"
    with pytest.raises(WeightUpdateError) as caught:
        WeightPusher(engine, dtype="int8")
    assert caught.value.field == "dtype"
