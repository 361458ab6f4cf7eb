"""TRL's trainers over an engine of ours: `attach` for GRPO and RLOO, `make_rollout_func` for rollouts of one's own,
`WeightTransfer` for AsyncGRPO.

Owns what of a TRL trainer is read and set (version 1.16; tests/frameworks/trl holds it against the real one), and how
its processes share one engine: rank 0 asks it for the samples of all. Loads no TRL: a trainer comes as it is.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.client import Client
from headrace.engine import DEFAULT_UPDATE_TIMEOUT, Engine
from headrace.rl.push import PushReport, WeightPusher
from headrace.rl.sources import NamedTensor
from headrace.rl.trainer_ranks import TrainerRanks
from headrace.rl.trl_conversations import ConversationRollouts
from headrace.types.errors import RequestError, UnavailableError
from headrace.types.sampling_params import SamplingParams
from headrace.types.weights import InFlight

if TYPE_CHECKING:
    from headrace.rl.rollout import RolloutLoop

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]
_READ = (
    "accelerator",
    "args",
    "max_completion_length",
    "model",
    "processing_class",
    "state",
    "temperature",
    "use_vllm",
)
_FROM_TRAINER = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_KWARGS = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""Names that vLLM, and so `generation_kwargs`, has for parameters of ours."""


class TrlSample(msgspec.Struct, frozen=True):
    """One completion: its ids with the stop token, and the natural log of the probability each was drawn with.
    `version` is that of the weights that drew the last token."""

    ids: list[int]
    logprobs: list[float]
    version: str


class TrlPolicy:
    """A TRL trainer's policy in an engine: pushed from the trainer, sampled with the trainer's parameters.

    All processes of the trainer construct it, and make the same calls; the main one has the target. `reports` are those
    of all pushes.
    """

    def __init__(
        self,
        trainer: Any,
        target: Engine | Client | None,
        *,
        dtype: Any = None,
        in_flight: InFlight = "drain",
        verify: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> None:
        """See `attach`."""
        _check_trainer(trainer)
        group = _group_of(trainer)
        self._trainer = trainer
        self._ranks = TrainerRanks(group)
        self._pusher = WeightPusher(target, group, dtype)
        self._target = target
        self._terms: dict[str, Any] = {"in_flight": in_flight, "verify": verify, "timeout": timeout}
        self.reports: list[PushReport] = []
        self.pushed_step: int | None = None

    def push(self) -> PushReport:
        """Make the trainer's weights live, labelled with its `global_step`. Adapters of PEFT are merged meanwhile."""
        step = self._trainer.state.global_step
        with _plain_weights(self._trainer) as weights:
            report = self._pusher.push(weights, str(step), **self._terms)
        self.reports.append(report)
        self.pushed_step = step
        return report

    def sample(self, prompts: Sequence[Sequence[int]], num_generations: int) -> list[TrlSample]:
        """One completion for each of this process's prompts. Of the prompts of all processes, in their order, each
        comes `num_generations` times in a row: those are samples of one prompt."""
        found = self._ranks.tell(msgspec.msgpack.encode([list(map(int, prompt)) for prompt in prompts]))
        parts = [msgspec.msgpack.decode(part, type=list[list[int]]) for part in found]
        start, stop = (sum(map(len, parts[: self._ranks.rank + i])) for i in (0, 1))
        samples, _ = self._ranks.attempt(lambda: self._drawn(list(itertools.chain(*parts)), num_generations))
        answer = self._ranks.agree(msgspec.msgpack.encode(samples))
        return msgspec.msgpack.decode(answer, type=list[TrlSample])[start:stop]

    def _drawn(self, prompts: list[list[int]], num_generations: int) -> list[TrlSample]:
        """On rank 0 the samples of all, elsewhere none."""
        if self._ranks.rank > 0 or not prompts:
            return []
        target: Any = self._target
        params = self._params()
        runs = list(_runs(prompts, num_generations))
        generations = target.generate(
            input_ids=[prompt for prompt, _ in runs],
            sampling_params=[msgspec.structs.replace(params, n=count) for _, count in runs],
            logprob_mode="sampled",
            progress=False,
        )
        for each in generations:
            if each.finish_reason == "abort":
                message = f"a completion of prompt {each.prompt_index} was aborted: {each.finish_message}"
                raise UnavailableError(message, field="prompts")
        return [TrlSample(each.token_ids, each.logprobs, _last_version(each.version_spans)) for each in generations]

    def _params(self) -> SamplingParams:
        """What the trainer would give its own generation, as it says now."""
        values = {name: getattr(self._trainer, name, None) for name in _FROM_TRAINER}
        values["max_new_tokens"] = self._trainer.max_completion_length
        for name, value in (self._trainer.args.generation_kwargs or {}).items():
            values[_KWARGS.get(name, name)] = value
        return SamplingParams.from_dict(values, field="generation_kwargs")


class TrlGeneration:
    """What a trainer that `attach` was called for has as its `vllm_generation`: TRL calls both methods."""

    def __init__(self, policy: TrlPolicy) -> None:
        self.policy = policy

    def sync_weights(self) -> None:
        """Called before sampling when `global_step` has moved."""
        self.policy.push()

    def generate(
        self, prompts: list[list[int]], images: list[Any] | None, num_generations: int, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], list[list[list[int]]]]:
        """(prompt ids, completion ids, log-probabilities, their ids), one of each a prompt; of the last two a list of
        one per token. Raises `RequestError` for images."""
        if any(images or ()):
            raise RequestError("images are not supported by this engine", field="images")
        with profiler or contextlib.nullcontext():
            samples = self.policy.sample(prompts, num_generations)
        logprobs = [[[logprob] for logprob in each.logprobs] for each in samples]
        return prompts, [each.ids for each in samples], logprobs, [[[token] for token in each.ids] for each in samples]


def attach(
    trainer: Any,
    target: Engine | Client | None,
    *,
    dtype: Any = None,
    in_flight: InFlight = "drain",
    verify: bool = False,
    timeout: float = DEFAULT_UPDATE_TIMEOUT,
) -> TrlGeneration:
    """Let a `GRPOTrainer` or `RLOOTrainer` sample from `target`, and push its weights there as they change.

    trainer   made without `use_vllm`; all its processes call this
    target    an `Engine`, a `Client` or a `Runtime`; None on other processes than the main one
    dtype     what tensors are converted to before they are sent, as "bfloat16" (None: as they are)
    in_flight, verify, timeout   as in `WeightPusher.push`

    The version of the weights is the trainer's `global_step`. Log-probabilities are those that tokens were drawn with,
    so TRL's importance sampling correction (`vllm_importance_sampling_*` of its arguments) applies. Returns what the
    trainer calls from now on; `policy.reports` of it are the pushes.

    Raises `RequestError` naming what cannot be attached, and as `WeightPusher`.
    """
    policy = TrlPolicy(trainer, target, dtype=dtype, in_flight=in_flight, verify=verify, timeout=timeout)
    generation = TrlGeneration(policy)
    trainer.vllm_generation = generation
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "server", -1
    return generation


def make_rollout_func(
    target: Engine | Client | None,
    *,
    loop: RolloutLoop | None = None,
    dtype: Any = None,
    in_flight: InFlight = "drain",
    verify: bool = False,
    timeout: float = DEFAULT_UPDATE_TIMEOUT,
) -> RolloutFunc:
    """A `rollout_func` for `GRPOTrainer`: each prompt, of which TRL repeats every one `num_generations` times in a row,
    is one completion. Weights are pushed when `global_step` has moved; the rest is as in `attach`.

    loop   conversations with tools instead of one reply: prompts are messages then, and what tools answered is masked
           (`env_mask`). Its sampling parameters are its own; each process of a trainer has one

    Reward functions get columns beside TRL's own: `weight_version`, and with a loop `rollout_status`, `rollout_turns`
    (a number) and `rollout_reward` (None if the loop has no reward). TRL corrects for what was drawn from older weights
    only where `attach` was called too.
    """
    options: dict[str, Any] = {"dtype": dtype, "in_flight": in_flight, "verify": verify, "timeout": timeout}
    return _Rollouts(target, None if loop is None else ConversationRollouts(loop), options)


class _Rollouts:
    """The policy of the trainer that calls, which is known when it does."""

    def __init__(
        self, target: Engine | Client | None, conversations: ConversationRollouts | None, options: Mapping[str, Any]
    ) -> None:
        self._target = target
        self._conversations = conversations
        self._options = options
        self._policy: TrlPolicy | None = None
        self._trainer: Any = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        if self._policy is None or self._trainer is not trainer:
            self._policy, self._trainer = TrlPolicy(trainer, self._target, **self._options), trainer
        if not trainer.use_vllm and self._policy.pushed_step != trainer.state.global_step:
            self._policy.push()  # an attached trainer has done so
        if self._conversations is not None:
            return self._conversations.run(prompts)
        rows = [_prompt_ids(trainer, prompt) for prompt in prompts]
        is_training = trainer.model.training
        count = trainer.num_generations if is_training else trainer.num_generations_eval
        samples = self._policy.sample(rows, count)
        return {
            "prompt_ids": rows,
            "completion_ids": [each.ids for each in samples],
            "logprobs": [each.logprobs for each in samples],
            "weight_version": [each.version for each in samples],
        }


class WeightTransfer:
    """The `weight_transfer` of an `AsyncGRPOTrainer`: its weights go to `target`, by whatever road reaches it.

    target           as in `attach`; that of a `Client` is the server whose address the trainer was given
    dtype, verify, timeout   as in `WeightPusher`; `timeout` also bounds a pause

    Requests that run are paused while weights come, and go on with the new ones. Versions count from 1, as the
    trainer's `model_version` does. A run that ends half-way leaves the last whole weights, and no pause.
    """

    def __init__(
        self,
        target: Engine | Client,
        *,
        dtype: Any = None,
        verify: bool = False,
        timeout: float = DEFAULT_UPDATE_TIMEOUT,
    ) -> None:
        self._pusher = WeightPusher(target, dtype=dtype)
        self._target = target
        self._terms: dict[str, Any] = {"in_flight": "keep", "verify": verify, "timeout": timeout}
        self._timeout = timeout
        self._is_pausing = False
        self.reports: list[PushReport] = []

    def init_weight_transfer(self) -> None:
        """Nothing is made: a target that does not answer raises."""
        self._target.status()

    def pause(self) -> None:
        self._target.pause("keep", timeout=self._timeout)
        self._is_pausing = True

    def send_weights(self, iterator: Iterator[NamedTensor]) -> None:
        """Raises `WeightUpdateError` naming the tensor; the weights before serve on."""
        self.reports.append(self._pusher.push(iterator, str(len(self.reports) + 1), **self._terms))

    def resume(self) -> None:
        self._target.resume()
        self._is_pausing = False

    def destroy(self) -> None:
        """The end of training: a pause that it leaves ends."""
        if self._is_pausing:
            self.resume()


def _check_trainer(trainer: Any) -> None:
    missing = [name for name in _READ if not hasattr(trainer, name)]
    if missing:
        message = f"trainer must be a GRPOTrainer or RLOOTrainer, not {type(trainer).__name__}, without {missing[0]}"
        raise RequestError(message, field="trainer")
    if trainer.use_vllm and not isinstance(getattr(trainer, "vllm_generation", None), TrlGeneration):
        raise RequestError("trainer has a vLLM of its own: make it without use_vllm", field="trainer")
    if getattr(trainer.args, "vllm_structured_outputs_regex", None) is not None:
        message = "vllm_structured_outputs_regex is not supported by this engine"
        raise RequestError(message, field="vllm_structured_outputs_regex")
    state = trainer.accelerator.state
    deepspeed, fsdp = (getattr(state, f"{name}_plugin", None) for name in ("deepspeed", "fsdp"))
    if getattr(deepspeed, "zero_stage", 0) == 3:
        raise RequestError("trainer shards parameters by ZeRO 3, which is not read: use FSDP2", field="trainer")
    if fsdp is not None and getattr(fsdp, "fsdp_version", 2) == 1:
        raise RequestError("trainer shards parameters by FSDP1, which is not read: use fsdp_version 2", field="trainer")
    if fsdp is not None and _has_adapters(trainer):
        raise RequestError("adapters of PEFT cannot be merged in shards of FSDP", field="trainer")


def _group_of(trainer: Any) -> Any:
    if trainer.accelerator.num_processes == 1:
        return None
    from torch import distributed

    return distributed.group.WORLD


def _has_adapters(trainer: Any) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "merge_adapter")


@contextlib.contextmanager
def _plain_weights(trainer: Any) -> Iterator[Any]:
    """The trainer's weights under the names of the model's checkpoint; adapters are merged until it is left."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not _has_adapters(trainer):
        yield model
        return
    model.merge_adapter()
    try:
        yield _without_adapters(model)
    finally:
        model.unmerge_adapter()


def _without_adapters(model: Any) -> dict[str, Any]:
    """A state dict of what an adapted model was made from, with modules that are trained as a whole in their places."""
    found: dict[str, Any] = {}
    for name, tensor in model.get_base_model().state_dict().items():
        parts = name.split(".")
        if any(part.startswith(model.prefix) or part == "original_module" for part in parts):
            continue
        found[name.replace(".base_layer", "").replace(".modules_to_save.default", "")] = tensor
    return found


def _runs(prompts: Sequence[list[int]], num_generations: int) -> Iterator[tuple[list[int], int]]:
    """Each prompt once, with how often it comes in a row; no more than `num_generations` at a time."""
    for start in range(0, len(prompts), num_generations):
        for prompt, same in itertools.groupby(prompts[start : start + num_generations]):
            yield prompt, sum(1 for _ in same)


def _last_version(spans: Sequence[tuple[str, int]]) -> str:
    return spans[-1][0] if spans else ""


def _prompt_ids(trainer: Any, prompt: Any) -> list[int]:
    """A text or messages, as the trainer itself would encode them."""
    if isinstance(prompt, str):
        return [int(token) for token in trainer.processing_class(text=prompt)["input_ids"]]
    options: dict[str, Any] = {"tools": getattr(trainer, "tools", None) or None}
    options |= {"chat_template": getattr(trainer, "chat_template", None), **(trainer.chat_template_kwargs or {})}
    encoded = trainer.processing_class.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    return [int(token) for token in encoded["input_ids"]]
