"""What is told about each route: its dialect, what it does, the type of its body, and what it refuses.

`/openapi.json`, `/docs` and docs/http.md are made of this table and of the routes themselves. Bodies and lists of keys
are those that the handlers read with; `tests/server/test_openapi.py` holds every row against its handler.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from headrace.server import admin, dashboard, keys, native_weights, openai_models, openai_types, probing, saving
from headrace.server import vllm_types as vllm
from headrace.server import weight_groups as groups
from headrace.server import weights as buckets
from headrace.server.dashboard_state import (
    DASHBOARD_PATH,
    DOCS_PATH,
    OPENAPI_PATH,
    REWARDS_PATH,
    STATE_PATH,
    DashboardState,
)
from headrace.server.native_types import GenerateBody
from headrace.server.vllm_generate import TokensBody
from headrace.types import http
from headrace.types.http import BYTES_TYPE, MESSAGE_TYPE, PREFIX

Dialect = Literal["SGLang", "OpenAI", "vLLM", "Headrace", "Watching"]
DIALECTS: dict[Dialect, str] = {
    "SGLang": "Generation and control as SGLang's clients and trainers call them. Control calls take a JSON object.",
    "OpenAI": "As OpenAI's clients call them, with the keys that SGLang and vLLM add.",
    "vLLM": "What trainers that speak to vLLM call. Arguments may be in the query, in a JSON body, or absent.",
    "Headrace": "The methods of `Engine`, as `headrace.Client` calls them; MessagePack, but for generation.",
    "Watching": "Health, load, figures and pages.",
}

JSON = "application/json"
_TEXT = "text/plain"
_NULL = "null"
_NOTHING = "nothing"
_DONE = "`success` and `message`"
_REPORT = "`success`, `message` and the `report` of an update that is live"


class RouteNote(msgspec.Struct, frozen=True, kw_only=True):
    """What is told about one route. `body` is the type of its body, None where it looks at none; `query` are keys of
    the query. `refused` are keys that are known and refused if they ask for something, `remark` says what else is."""

    dialect: Dialect
    summary: str
    body: Any = None
    media_type: str = JSON
    reply: str = ""
    reply_type: Any = None
    query: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    remark: str = ""


def rows(dialect: Dialect, paths: str, summary: str, body: Any = None, **more: Any) -> dict[str, RouteNote]:
    """The same about each of `paths`, which spaces part; `more` are fields of `RouteNote`."""
    return {path: RouteNote(dialect=dialect, summary=summary, body=body, **more) for path in paths.split()}


def _sorted(*names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set().union(*names)))


_GENERATING: dict[str, RouteNote] = {
    **rows(
        "SGLang",
        "/generate",
        "Samples of one prompt or many, whole or as a stream of events.",
        GenerateBody,
        reply="an object for one prompt and one sample, else a list: `text`, `output_ids`, `meta_info`",
        refused=_sorted(keys.LACKING_GENERATE, (f"sampling_params.{name}" for name in keys.LACKING_SAMPLING)),
        remark="Unknown sampling parameters, and of `custom_params` all but `return_top_p_token_ids`; unknown keys of "
        "the body are passed over with a warning.",
    ),
    **rows(
        "OpenAI",
        "/v1/chat/completions",
        "A reply to a conversation, with tools if they are given.",
        openai_types.ChatBody,
        reply="a `chat.completion`, or a stream of its chunks",
        refused=_sorted(keys.LACKING_OPENAI),
        remark="A `tool_choice` that forces a call; content that is no text.",
    ),
    **rows(
        "OpenAI",
        "/v1/completions",
        "Samples of texts or token ids.",
        openai_types.CompletionBody,
        reply="a `text_completion`, or a stream of its chunks",
        refused=_sorted(keys.LACKING_OPENAI),
    ),
    **rows(
        "vLLM",
        "/inference/v1/generate",
        "Samples of token ids, without text.",
        TokensBody,
        reply="`request_id`, `choices` with `token_ids`, `usage`",
        refused=("features", "kv_transfer_params", "stream"),
        remark="`sampling_params` are the keys of `/v1/completions`, and what is refused there is refused here.",
    ),
    **rows(
        "Headrace",
        f"{PREFIX}/generate",
        "`Engine.generate`, `score` (`scores`) and `stream` (`stream`).",
        http.GenerateAsk,
        reply="a list of `Generation`, or, as a stream, `StreamPart`s, each behind its length (4 bytes, little-endian)",
    ),
}

_SGLANG: dict[str, RouteNote] = {
    **rows(
        "SGLang",
        "/abort_request",
        "End the requests whose names begin with `rid`, or all.",
        admin.AbortBody,
        reply=_NOTHING,
    ),
    **rows(
        "SGLang",
        "/pause_generation",
        "Generate nothing until `/continue_generation`.",
        admin.PauseBody,
        reply="`message` and `status`",
        remark=f"A `mode` other than {', '.join(admin.PAUSE_MODES)}.",
    ),
    **rows(
        "SGLang",
        "/continue_generation",
        "Generate again.",
        dict,
        reply="`message` and `status`",
        remark="409 while an update in buckets is incomplete, or no whole weights are live.",
    ),
    **rows(
        "SGLang", "/release_memory_occupation", "Give memory of `tags`, or all, back.", admin.ReleaseBody, reply=_NULL
    ),
    **rows(
        "SGLang", "/resume_memory_occupation", "Take memory of `tags`, or all, again.", admin.ResumeBody, reply=_NULL
    ),
    **rows(
        "SGLang", "/flush_cache", "Free what the prefix cache holds; aborts nothing, is never needed.", reply="a text"
    ),
    **rows(
        "SGLang",
        "/update_weights_from_disk",
        "Weights from a folder of the server's.",
        admin.DiskBody,
        reply=_REPORT,
        remark="Folders outside the model's own and `--weight-root`; a `load_format` other than auto, safetensors, "
        "bin and pt; a `manifest`.",
    ),
    **rows("SGLang", "/abort_weight_update", "Drop the open update, whoever began it.", dict, reply=_DONE),
    **rows("SGLang", "/post_process_weights", "Nothing is to be done.", admin.PostProcessBody, reply=_DONE),
    **rows(
        "SGLang",
        "/update_weight_version",
        "Another label for the live weights.",
        admin.VersionBody,
        reply=f"{_DONE}, `new_version`",
        remark="409 after an update that has failed, until others land.",
    ),
    **rows(
        "SGLang",
        "/get_weights_by_name",
        "The first rows of a live tensor.",
        admin.NameBody,
        reply="nested lists of numbers",
        remark=f"More than {admin.MAX_READ_ELEMENTS} numbers.",
    ),
    **rows(
        "SGLang",
        "/weights_checker",
        "Digests of live weights, and a comparison with a snapshot.",
        admin.CheckerBody,
        reply=f"{_DONE}, for `checksum` also `ranks` and `per_engine_checksum`",
        remark="A GET that changes something (`snapshot`, `reset_tensors`); a `selector` of a draft model.",
    ),
    **rows(
        "SGLang",
        "/update_weights_from_tensor",
        "A bucket of an update.",
        buckets.TensorBody,
        reply=_REPORT,
        remark="A `load_format` other than null and `flattened_bucket`; a `selector` of a draft model.",
    ),
    **rows(
        "SGLang",
        "/begin_weight_update",
        "The next bucket begins an update anew.",
        buckets.SelectorBody,
        reply=_DONE,
        remark="A `selector` of a draft model.",
    ),
    **rows("SGLang", "/end_weight_update", "The update in buckets has to be complete.", dict, reply=_DONE),
    **rows("SGLang", "/init_weights_update_group", "Join a trainer's group.", groups.InitGroupBody, reply=_DONE),
    **rows(
        "SGLang",
        "/update_weights_from_distributed",
        "A bucket that a trainer broadcasts meanwhile.",
        groups.GroupUpdateBody,
        reply=_REPORT,
    ),
    **rows("SGLang", "/destroy_weights_update_group", "Leave a trainer's group.", groups.DestroyGroupBody, reply=_DONE),
    **rows("SGLang", "/slow_down", "Wait before each step, for tests.", probing.SlowBody, reply=_NULL),
    **rows("SGLang", "/freeze_gc", "Collect the core's garbage once and for all.", dict, reply=_NOTHING),
    **rows(
        "SGLang",
        "/start_profile",
        "Trace what the core computes.",
        probing.ProfileBody,
        reply=f"{_DONE}, `file`",
        refused=("merge_profiles", "profile_by_stage", "profile_stages", "start_step"),
        remark="Folders outside `--save-root`.",
    ),
    **rows("SGLang", "/stop_profile", "End the trace.", dict, reply=f"{_DONE}, `file`"),
    **rows(
        "SGLang",
        "/collective_rpc",
        "Call a method of the engine by its name.",
        probing.RpcBody,
        reply="`results`",
        remark="Methods that are not on a closed list.",
    ),
}

_VLLM: dict[str, RouteNote] = {
    **rows("vLLM", "/pause", "Generate nothing until `/resume`.", vllm.PauseAsk, reply="`status`"),
    **rows("vLLM", "/resume", "Generate again.", dict, reply="`status`"),
    **rows("vLLM", "/is_paused", "Whether it is paused.", reply="`is_paused`"),
    **rows(
        "vLLM", "/abort_requests", "End these requests, or all.", vllm.AbortRequestsAsk, reply="`status`, `aborted`"
    ),
    **rows(
        "vLLM",
        "/sleep",
        "Give memory back.",
        vllm.SleepAsk,
        reply=_NOTHING,
        remark="Level 1 for weights without `keep_weights_copy`; levels other than 1 and 2.",
    ),
    **rows("vLLM", "/wake_up", "Take memory again.", vllm.WakeAsk, reply=_NOTHING),
    **rows("vLLM", "/is_sleeping", "Whether memory of weights or KV is released.", reply="`is_sleeping`"),
    **rows("vLLM", "/reset_prefix_cache", "Free what the prefix cache holds.", vllm.ResetAsk, reply="`success`"),
    **rows("vLLM", "/weight_info", "The label of the live weights.", reply="`weight_version`"),
    **rows("vLLM", "/get_world_size", "How many ranks hold the model.", reply="`world_size`"),
    **rows(
        "vLLM",
        "/init_weight_transfer_engine",
        "Join a trainer that broadcasts weights.",
        vllm.InitAsk,
        reply="`message`",
        remark="An id of NCCL on a CPU.",
    ),
    **rows(
        "vLLM",
        "/start_weight_update",
        "The next tensors begin an update.",
        vllm.StartAsk,
        reply="`message`",
        remark="Tensors by other names than a checkpoint's (`is_checkpoint_format: false`).",
    ),
    **rows("vLLM", "/start_draft_weight_update", "Refused: there is no draft model.", remark="Always."),
    **rows(
        "vLLM",
        "/update_weights",
        "Tensors that are broadcast meanwhile, or all of a folder.",
        vllm.UpdateAsk,
        reply="`message`, `report`",
        refused=("update_info.ipc_handles", "update_info.ipc_handles_pickled"),
    ),
    **rows(
        "vLLM",
        "/finish_weight_update",
        "The update has to be complete, and is live then.",
        vllm.FinishAsk,
        reply="`message`, `report`",
    ),
}

_OPENAI: dict[str, RouteNote] = {
    **rows("OpenAI", "/v1/models", "The model that is served.", reply="a list of one"),
    **rows("OpenAI", "/v1/models/{model}", "The same, by its name.", reply="the model", remark="404 for another name."),
    **rows(
        "OpenAI",
        "/tokenize /v1/tokenize",
        "Token ids of a text, of many, or of a conversation.",
        openai_models.TokenizeBody,
        reply="`tokens`, `count`, `max_model_len`",
    ),
    **rows(
        "OpenAI",
        "/detokenize /v1/detokenize",
        "Text of token ids.",
        openai_models.DetokenizeBody,
        reply="`text` and, the same, `prompt`",
    ),
}

_WATCHING: dict[str, RouteNote] = {
    **rows("Watching", "/health /liveness", "This process lives, and its core.", reply=_NOTHING, remark="503 if not."),
    **rows(
        "Watching", "/health_generate", "The core answers. Generates nothing.", reply=_NOTHING, remark="503 if not."
    ),
    **rows(
        "Watching",
        "/ready",
        "A request that came now would start now.",
        reply="`ready`, `weight_version`",
        remark="503 with the reason and `weights_state` if not.",
    ),
    **rows("Watching", "/model_info /get_model_info", "What is served.", reply="an object"),
    **rows(
        "Watching",
        "/server_info /get_server_info",
        "Settings as resolved, and the state.",
        reply="an object",
        query=("config_format",),
    ),
    **rows(
        "Watching",
        "/weight_version /get_weight_version",
        "The live weights.",
        reply="`weight_version`, `weights_state`",
    ),
    **rows("Watching", "/get_load", "Requests and tokens in flight.", reply="a list of one object"),
    **rows(
        "Watching",
        "/v1/loads",
        "The same, and rates.",
        reply="an object, or Prometheus' text",
        query=("dp_rank", "format"),
        remark="A `dp_rank` other than 0.",
    ),
    **rows("Watching", "/metrics", "Counters, gauges and histograms.", reply="Prometheus' text"),
    **rows("Watching", DASHBOARD_PATH, "A page that shows what the engine does.", reply="a page"),
    **rows(
        "Watching",
        STATE_PATH,
        "What that page reads: all that is newer than `since`.",
        reply="points, updates and samples",
        reply_type=DashboardState,
        query=("since",),
    ),
    **rows(
        "Watching",
        REWARDS_PATH,
        "Rewards of samples by request id, for that page.",
        dashboard.RewardsBody,
        reply="`num_known`: how many are of samples that it remembers",
    ),
    **rows("Watching", DOCS_PATH, "A page that shows this list.", reply="a page"),
    **rows("Watching", OPENAPI_PATH, "This list, as OpenAPI 3.1.", reply="an OpenAPI document"),
}

_OWN_BODIES: dict[str, Any] = {
    "begin_update": http.BeginAsk,
    "extend_update": http.ExtendAsk,
    "join_update": http.JoinAsk,
    "settle_part": http.SettleAsk,
    "lend": http.LendAsk,
    "stage_lent": http.StageLentAsk,
    "stage_from_group": http.StageGroupAsk,
    "commit": http.CommitAsk,
    "abort_update": http.AbortAsk,
    "update_weights_from_disk": native_weights.DiskAsk,
    "get_weights_by_name": native_weights.NameAsk,
    "save_model": saving.FolderAsk,
    "save_sharded_model": saving.ShardedAsk,
    "save_remote_model": saving.RemoteAsk,
}


def _first_sentence(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."


_OWN: dict[str, RouteNote] = {
    **{
        f"{PREFIX}/{name}": RouteNote(
            dialect="Headrace",
            summary=_first_sentence(kind),
            body=kind,
            media_type=MESSAGE_TYPE,
            reply="the result, as MessagePack",
        )
        for name, kind in _OWN_BODIES.items()
    },
    f"{PREFIX}/stage": RouteNote(
        dialect="Headrace",
        summary="The bytes of tensors of a session: the length of a `StageHead`, that head, and its pieces.",
        body=bytes,
        media_type=BYTES_TYPE,
        reply="null, as MessagePack",
    ),
}

NOTES: dict[str, RouteNote] = {**_GENERATING, **_SGLANG, **_OPENAI, **_VLLM, **_WATCHING, **_OWN}
"""By path, a part that varies in braces. Of `/headrace/METHOD` those whose body is not just a method's arguments."""


def note_of(path: str) -> RouteNote | None:
    """What is told about a route of a server; None for one that nobody has described."""
    found = NOTES.get(path)
    if found is not None or not path.startswith(f"{PREFIX}/"):
        return found
    method = path.removeprefix(f"{PREFIX}/")
    summary = f"`Engine.{method}`: its arguments by their names."
    reply = "the result, as MessagePack"
    return RouteNote(dialect="Headrace", summary=summary, body=dict, media_type=MESSAGE_TYPE, reply=reply)
