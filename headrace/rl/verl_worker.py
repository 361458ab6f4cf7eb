"""Rollouts for code that was written against verl's workers, before its rollouts became servers: `DataProto` in,
`DataProto` out. New code names a backend instead: `headrace.rl.verl_plugin`.

Owns what a row of a `DataProto` is here. Of verl nothing is imported: what comes says what goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from headrace.engine import Engine
from headrace.engine.tensors import NamedTensors
from headrace.rl.verl_plugin.translation import launch_of
from headrace.types.errors import ConfigError, RequestError
from headrace.types.plain_values import hint
from headrace.types.weights import UpdateReport

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DEFAULTS: dict[str, Any] = {
    **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 1},
    **{"expert_parallel_size": 1, "quantization": None, "quantization_config_file": None},
    **{"enable_rollout_routing_replay": False, "dtype": "bfloat16", "load_format": "auto", "max_model_len": None},
    **{"skip_tokenizer_init": True, "max_num_seqs": None, "max_num_batched_tokens": None, "enforce_eager": False},
    **{"gpu_memory_utilization": 0.5, "free_cache_engine": False, "enable_prefix_caching": True, "seed": 0},
    **{"full_determinism": False, "logprobs_mode": "processed_logprobs"},
    **{"calculate_log_probs": True, "ignore_eos": False, "do_sample": True},
}
"""Of fields that a rollout config leaves out."""

_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
_READ = (*_SAMPLING, "response_length", "eos_token_id", "pad_token_id", "do_sample", "validate")
_GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}


class HeadraceRolloutWorker:
    """The rollout part of verl's `ActorRolloutRefWorker`, of one process: it has one engine, and its calls wait.

    config   as verl's: `model.path`, and `rollout` with `prompt_length`, `response_length` and what
             docs/verl.md lists; `rollout.val_kwargs` for validation
    role     "rollout"; nothing here trains

    Raises `ConfigError` naming the field.
    """

    def __init__(self, config: Any, role: str = "rollout") -> None:
        if role != "rollout":
            raise ConfigError(f"role {role!r}: this worker samples and scores, it does not train", field="role")
        rollout = _mapping(config, "rollout")
        path = str(_mapping(config, "model").get("path") or "")
        if not path:
            raise ConfigError("model.path is missing", field="model.path")
        for name in ("prompt_length", "response_length"):
            if not isinstance(rollout.get(name), int):
                raise ConfigError(f"rollout.{name} is to be a number of tokens", field=f"rollout.{name}")
        self._rollout = SimpleNamespace(**{**_DEFAULTS, "engine_kwargs": {}, **rollout})
        # Older configs say what the dummy weights wait for, or which files are read: "dummy_dtensor", "safetensors".
        if (form := str(self._rollout.load_format)) not in ("auto", "dummy"):
            self._rollout.load_format = "dummy" if form.startswith("dummy") else "auto"
        if self._rollout.enable_rollout_routing_replay:
            message = (
                "rollout.enable_rollout_routing_replay=True is not supported by generate_sequences; leave it at False"
            )
            raise ConfigError(message, field="enable_rollout_routing_replay")
        self._launch = launch_of(self._rollout, path, "hybrid", 0)
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """What `init_model` started; `ConfigError` before that."""
        if self._engine is None:
            raise ConfigError("init_model() has not been called", field="engine")
        return self._engine

    def init_model(self) -> None:
        """Start the engine; once. Where `rollout.load_format` is a dummy one, nothing is generated before weights
        come: `NeedsWeightsError`."""
        if self._engine is None:
            self._engine = Engine(**self._launch.engine)
            if self._launch.awaits_weights:
                self._engine.weights_checker("reset_tensors")

    def shutdown(self) -> None:
        """End the engine. Idempotent."""
        if self._engine is not None:
            self._engine.shutdown()

    def update_weights(self, named_tensors: NamedTensors, global_steps: int) -> UpdateReport:
        """Make a whole model live, labelled `global_steps`. Raises as `Engine.update_weights_from_tensor`."""
        return self.engine.update_weights_from_tensor(named_tensors, str(global_steps))

    def generate_sequences(self, prompts: Any, **sampling: Any) -> Any:
        """One response for each row of a `DataProto`; a trainer that wants several repeats the row.

        In: `input_ids`, `attention_mask`, `position_ids`, int64 [rows, prompt_length], padded on the left. Of
        `meta_info` are read `eos_token_id` (one or several), `pad_token_id`, `do_sample`, `validate`, and as in
        `sampling` `temperature`, `top_p`, `top_k`, `repetition_penalty`, `response_length`; `sampling` takes no others.
        Out, in the same order: `prompts`; `responses` [rows, response_length], padded on the right; of both together
        `input_ids`, `attention_mask`, `position_ids`; `response_mask`; with `rollout.calculate_log_probs`
        `rollout_log_probs`, float32, 0 where there is no token; for each row `min_global_steps` and `max_global_steps`,
        the labels of the weights that sampled it, as they are.

        Raises `RequestError` naming the field.
        """
        import torch

        for name in sampling:
            if name not in _READ:
                raise RequestError(f"{name} is not an argument of generate_sequences{hint(name, _READ)}", field=name)
        batch, meta = prompts.batch, {**prompts.meta_info, **sampling}
        length = int(meta.get("response_length") or self._rollout.response_length)
        rows = _unpadded(batch["input_ids"], batch["attention_mask"])
        stops = _listed(meta.get("eos_token_id"))
        found = self.engine.generate(
            input_ids=rows,
            sampling_params={
                **self._sampling(meta),
                "max_new_tokens": length,
                "stop_token_ids": stops,
                "ignore_eos": bool(self._rollout.ignore_eos or stops),  # those that are named, and no others
            },
            progress=False,
        )
        pad = meta.get("pad_token_id")
        responses = _padded([each.token_ids for each in found], length, 0 if pad is None else int(pad), torch.int64)
        mask = _padded([[1] * len(each.token_ids) for each in found], length, 0, batch["attention_mask"].dtype)
        steps = torch.arange(1, length + 1, dtype=batch["position_ids"].dtype)
        tensors = {
            "prompts": batch["input_ids"],
            "responses": responses,
            "response_mask": mask,
            "input_ids": torch.cat([batch["input_ids"], responses], dim=1),
            "attention_mask": torch.cat([batch["attention_mask"], mask], dim=1),
            "position_ids": torch.cat([batch["position_ids"], batch["position_ids"][:, -1:] + steps], dim=1),
        }
        if self._rollout.calculate_log_probs:
            tensors["rollout_log_probs"] = _padded([each.logprobs for each in found], length, 0.0, torch.float32)
        spans = [[label for label, _ in each.version_spans] or [self.engine.version] for each in found]
        labels = {"min_global_steps": [each[0] for each in spans], "max_global_steps": [each[-1] for each in spans]}
        return type(prompts).from_dict(tensors=tensors, non_tensors=_objects(labels), meta_info=dict(prompts.meta_info))

    def compute_log_prob(self, data: Any) -> Any:
        """Log-probabilities of given responses, by the engine's live weights.

        In: `input_ids` and `attention_mask` [rows, prompt and response], `responses` [rows, response_length];
        `meta_info["temperature"]`, by which logits are divided (1.0). Out: `old_log_probs`, float32
        [rows, response_length], 0 where there is no token. Entropies are not computed.
        """
        import torch

        batch = data.batch
        temperature = float(data.meta_info.get("temperature") or 1.0)
        masks, length = batch["attention_mask"].bool(), batch["responses"].shape[1]
        scored = self.engine.score(
            input_ids=_unpadded(batch["input_ids"], batch["attention_mask"]),
            sampling_params={"temperature": temperature},
            prompt_logprob_mode="temperature",
            progress=False,
        )
        found = torch.zeros(len(scored), masks.shape[1])
        for row, each in enumerate(scored):
            found[row, masks[row]] = torch.tensor([value or 0.0 for value in each.prompt_logprobs])
        return type(data).from_dict(
            tensors={"old_log_probs": found[:, -length:]}, meta_info={**data.meta_info, "temperature": temperature}
        )

    def _sampling(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """What a call's `meta_info` and the config say of sampling, the former before the latter."""
        own = vars(self._rollout)
        if meta.get("validate"):
            own = {**own, **dict(own.get("val_kwargs") or {})}
        if not meta.get("do_sample", own["do_sample"]):
            return dict(_GREEDY)
        given = {**own, **{name: meta[name] for name in _SAMPLING if meta.get(name) is not None}}
        return {name: given[name] for name in _SAMPLING if given.get(name) is not None}


def _mapping(config: Any, name: str) -> Mapping[str, Any]:
    """A part of a config, which may be verl's, with interpolations that are resolved by reading."""
    try:
        part = config[name]
        return {key: part[key] for key in part}
    except (KeyError, TypeError):
        raise ConfigError(f"config has no {name}", field=name) from None


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row."""
    if ids.shape != mask.shape:
        raise RequestError("attention_mask is not shaped as input_ids", field="attention_mask")
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def _padded(rows: Sequence[Sequence[float]], length: int, value: float, dtype: torch.dtype) -> Tensor:
    """Rows of up to `length` values, in a tensor [rows, length]."""
    import torch

    found = torch.full((len(rows), length), value, dtype=dtype)
    for tensor, row in zip(found, rows, strict=True):
        tensor[: len(row)] = torch.tensor(row, dtype=dtype)
    return found


def _listed(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [int(each) for each in ids] if isinstance(ids, Sequence) else [int(ids)]


def _objects(columns: Mapping[str, list[str]]) -> dict[str, Any]:
    import numpy as np

    return {name: np.array(values, dtype=object) for name, values in columns.items()}
