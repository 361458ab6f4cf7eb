"""The map's proof of exact coverage, and manifests checked whole."""

from __future__ import annotations

import pytest

from headrace.types.errors import InternalError, WeightUpdateError
from headrace.types.weights import TensorInfo
from headrace.weights import Box, ParamSpec, Piece, WeightMap, WeightRule, whole_rows
from headrace.weights.weight_map import is_recomputed
from tests.weights.tiny import LAYOUTS, make_map, make_tensors, manifest_of

PARAM = ParamSpec("p", (4, 3))


def rule(name: str, start: int, rows: int, columns: int = 3, param: str = "p") -> WeightRule:
    return whole_rows(name, param, start, (rows, columns))


def piece(source: Box, target: Box, axes: tuple[int, ...] = (), **fields: bool) -> Piece:
    return Piece("p", source, target, axes, **fields)


ALL = Box.whole((4, 3))


@pytest.mark.parametrize(
    ("params", "rules", "aliases", "named"),
    [
        ([PARAM], [rule("a", 0, 3)], {}, "3 elements are not covered"),
        ([PARAM], [rule("a", 0, 2), rule("b", 1, 3)], {}, r"\[0:2, 0:3\] of a and \[1:4, 0:3\] of b overlap"),
        ([PARAM], [rule("a", 0, 1), rule("b", 2, 2)], {}, "3 elements are not covered"),
        ([PARAM], [rule("a", 0, 5)], {}, r"\[0:5, 0:3\] of a is not inside"),
        ([PARAM], [rule("a", 0, 4, columns=2)], {}, "4 elements are not covered"),
        ([PARAM], [whole_rows("a", "p", 0, (4,))], {}, "of a is not inside"),
        ([PARAM], [rule("a", 0, 4), rule("a", 0, 4)], {}, "a has two rules"),
        ([PARAM], [rule("a", 0, 4), rule("b", 0, 4, param="q")], {}, "b .* maps to q"),
        ([PARAM, PARAM], [rule("a", 0, 4)], {}, "p is declared twice"),
        ([PARAM, ParamSpec("q", (2,))], [rule("a", 0, 4)], {}, "q .*: 2 elements are not covered"),
        ([ParamSpec("p", ())], [], {}, "p has shape"),
        ([ParamSpec("p", (0,))], [], {}, "p has shape"),
        ([ParamSpec("p", (4, 3), "int8")], [], {}, "p has dtype int8"),
        ([PARAM], [rule("a", 0, 4)], {"b": "c"}, "repeats c"),
        ([PARAM], [rule("a", 0, 4)], {"a": "a"}, "a has a rule of its own"),
        ([PARAM], [WeightRule("a", (4, 3), ())], {}, "a .* goes nowhere"),
        ([PARAM], [WeightRule("a", (3, 4), (piece(Box.whole((3, 4)), ALL),))], {}, "a .* does not fit p"),
        ([PARAM], [WeightRule("a", (4, 3), (piece(ALL, ALL, (0, 2)),))], {}, "a .* does not fit p"),
        ([PARAM], [WeightRule("a", (4, 3), (piece(Box((0, 1), (4, 3)), ALL),))], {}, "a .* does not fit p"),
        ([PARAM], [WeightRule("a", (5, 3), (piece(ALL, ALL),))], {}, "a .*: 3 elements are not covered"),
        ([PARAM], [WeightRule("a", (4, 3), (piece(ALL, ALL, is_counted=False),))], {}, "12 elements are not covered"),
        ([ParamSpec("p", (4, 3), padding=(Box((3, 0), (1, 3)),))], [rule("a", 0, 4)], {}, "of padding overlap"),
        (
            [ParamSpec("p", (4, 3)), ParamSpec("q", (4, 3), "float32")],
            [WeightRule("a", (8, 3), (piece(ALL, ALL), Piece("q", Box((4, 0), (4, 3)), ALL)))],
            {},
            "a .* is in parameters of several dtypes",
        ),
    ],
)
def test_a_map_that_is_not_a_partition_is_refused_by_name(
    params: list[ParamSpec], rules: list[WeightRule], aliases: dict[str, str], named: str
) -> None:
    with pytest.raises(InternalError, match=named):
        WeightMap(params, rules, aliases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_manifest_is_believed_in_any_order(layout: dict[str, bool]) -> None:
    weight_map = make_map(**layout)
    manifest = manifest_of(make_tensors(weight_map, 0))
    weight_map.check_manifest(manifest, False)
    weight_map.check_manifest(manifest[::-1], False)
    weight_map.check_manifest(manifest[:3], True)


Q = "model.layers.1.self_attn.q_proj.weight"
MISSHAPEN = [(16, 11), (12, 16), (192,), (16, 12, 1), (), (0, 12), (-16, -12)]


@pytest.mark.parametrize("shape", MISSHAPEN)
def test_a_misshapen_tensor_is_named(shape: tuple[int, ...]) -> None:
    weight_map = make_map()
    manifest = [
        TensorInfo(Q, shape, "float32") if info.name == Q else info for info in manifest_of(make_tensors(weight_map, 0))
    ]
    with pytest.raises(
        WeightUpdateError, match=r"model.layers.1.self_attn.q_proj.weight has shape .* expected \[16, 12\]"
    ) as caught:
        weight_map.check_manifest(manifest, False)
    assert caught.value.field == Q


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: [*m, TensorInfo("model.layers.9.x", (1,), "float32")],
            "model.layers.9.x is not a tensor of this model",
        ),
        (lambda m: [*m, m[3]], "model.layers.0.self_attn.v_proj.weight is named twice"),
        (lambda m: [*m[:5], *m[6:]], "model.layers.0.self_attn.k_proj.bias is missing"),
        (
            lambda m: [each for each in m if each.name != "lm_head.weight"],
            r"lm_head.weight is missing \(this model has a head of its own; .* keep_tied_head=True\)",
        ),
        (lambda m: [TensorInfo(m[0].name, m[0].shape, "int8"), *m[1:]], "model.embed_tokens.weight has dtype 'int8'"),
        (lambda m: [TensorInfo(m[0].name, m[0].shape, "torch.float32"), *m[1:]], "has dtype 'torch.float32'"),
        (lambda m: [TensorInfo(m[0].name, m[0].shape, "float32", "AB"), *m[1:]], "digest that is not 64 or 32"),
        (lambda m: [*m, TensorInfo("rotary_emb.inv_freq", (6,), "float32")], "rotary_emb.inv_freq is not a tensor"),
    ],
)
def test_every_kind_of_bad_manifest_is_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    weight_map = make_map()
    with pytest.raises(WeightUpdateError, match=message):
        weight_map.check_manifest(change(manifest_of(make_tensors(weight_map, 0))), False)


def test_all_faults_are_told_at_once_up_to_a_bound() -> None:
    weight_map = make_map()
    with pytest.raises(WeightUpdateError) as caught:
        weight_map.check_manifest([], False)
    assert "model.embed_tokens.weight is missing" in caught.value.message
    assert f"and {len(weight_map.rules_by_name) - 8} more" in caught.value.message


def test_a_partial_manifest_is_checked_but_for_what_it_leaves_out() -> None:
    weight_map = make_map()
    with pytest.raises(WeightUpdateError, match="at least one tensor"):
        weight_map.check_manifest([], True)
    with pytest.raises(WeightUpdateError, match="nope is not a tensor"):
        weight_map.check_manifest([TensorInfo("nope", (1,), "float32")], True)


def test_a_tied_name_may_be_left_out_or_sent_in_its_shape() -> None:
    weight_map = make_map(tied=True)
    manifest = manifest_of(make_tensors(weight_map, 0))
    weight_map.check_manifest(manifest, False)
    weight_map.check_manifest([*manifest, TensorInfo("lm_head.weight", (30, 12), "float32")], False)
    with pytest.raises(WeightUpdateError, match="lm_head.weight has shape"):
        weight_map.check_manifest([*manifest, TensorInfo("lm_head.weight", (31, 12), "float32")], False)
    with pytest.raises(WeightUpdateError, match="model.embed_tokens.weight is missing"):
        weight_map.check_manifest([*manifest[1:], TensorInfo("lm_head.weight", (30, 12), "float32")], False)


def test_derived_buffers_are_known() -> None:
    assert is_recomputed("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_recomputed("model.layers.0.self_attn.q_proj.bias")


def test_the_map_and_the_session_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, headrace.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_says_what_is_written_and_what_is_compared() -> None:
    weight_map = make_map(tied=True)
    manifest = manifest_of(make_tensors(weight_map, 0))
    plan = weight_map.plan(manifest, False)
    assert [rule.hf_name for rule in plan.rules] == [info.name for info in manifest] and not plan.compared
    plan = weight_map.plan([*manifest, TensorInfo("lm_head.weight", (30, 12), "float32")], False)
    assert plan.compared == {"lm_head.weight", "model.embed_tokens.weight"} and len(plan.rules) == len(manifest)
    alone = weight_map.plan([TensorInfo("lm_head.weight", (30, 12), "float32"), *manifest[1:]], False)
    assert alone.manifest[0].name == "model.embed_tokens.weight" and not alone.compared
