"""From settings to a running core. Owns where a model's files come from and what a core runs in: a process or a thread.

Nothing here waits for the core to be ready; the client does.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from headrace.config import EngineConfig, ModelSpec, ResolvedConfig, resolve
from headrace.config.machine import available_cores, check_working_directory
from headrace.ipc import BegunCore, CoreLink, FrontLink, Pulse, PulsePage, begin_process, make_pair
from headrace.ipc.rank_meeting import Meeting
from headrace.text import Tokenizer
from headrace.types.errors import ConfigError

ExecutorName = Literal["local", "free"]
ExecutorKind = ExecutorName | Meeting
"""A runner of the core's, nothing at all, or ranks in other processes of ours, which come to that meeting."""

MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
CONFIG_FILES = ("config.json", "generation_config.json")
"""All that resolving settings reads."""
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
"""All that a tokenizer may be made of."""

logger = logging.getLogger(__name__)


class CoreHost(Protocol):
    """What a core runs in. `pulse` says what its loop does."""

    pulse: PulsePage

    @property
    def pid(self) -> int: ...

    @property
    def is_alive(self) -> bool: ...

    def kill(self) -> None:
        """End it now, if that is possible."""

    def close(self, timeout: float) -> None:
        """Wait for its end, which has been asked for, and kill it after `timeout` seconds."""


class CoreThread:
    """A core in a thread of this process."""

    def __init__(self, resolved: ResolvedConfig, link: CoreLink, executor: ExecutorKind) -> None:
        self.pulse = PulsePage()
        self._thread = threading.Thread(
            target=self._run, args=(resolved, link, executor, self.pulse), name="headrace-core", daemon=True
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        """A thread cannot be killed: it ends when it sees its link closed."""

    def close(self, timeout: float) -> None:
        self._thread.join(timeout)

    @staticmethod
    def _run(resolved: ResolvedConfig, link: CoreLink, executor: ExecutorKind, page: PulsePage) -> None:
        from headrace.core import serve_core

        serve_core(resolved, link, executor, pulse=Pulse(page), shares_process=True)


def resolve_settings(
    config: EngineConfig,
    executor: ExecutorKind = "local",
    files: Sequence[str] = MODEL_FILES,
    first_device: int = 0,
    ranks_here: int | None = None,
    folder: Path | None = None,
) -> ResolvedConfig:
    """Find the model's files, unless they are in `folder`, and decide every open setting. Raises `ConfigError` and its
    kin.

    `files` are the patterns of those to have of a hub id, `first_device` is the index of the CUDA device to use, of
    `ranks_here`: 1 in a process of a trainer whose ranks are those of the engine.

    An executor that computes nothing has no device that could measure a pool: whatever is asked, it is on the CPU.
    """
    check_working_directory()
    if executor == "free":
        config = msgspec.structs.replace(config, device="cpu")
    folder = folder or model_folder(config.model, files)
    return resolve(config, folder, first_device=first_device, ranks_here=ranks_here)


def current_device() -> int:
    """Index of the CUDA device that torch uses in this thread; 0 where it uses none yet. Initialises nothing."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


def model_folder(model: str, files: Sequence[str] = MODEL_FILES, field: str = "model") -> Path:
    """The folder of a model: a local one, or the snapshot of a hub id (downloaded if need be).

    `field` is the setting that an error names.
    """
    folder = Path(os.path.expanduser(model))  # which leaves "~nobody" as it is
    try:
        if folder.is_dir():
            os.scandir(f"{folder}{os.sep}.").close()  # it may be listed, and entered
            return folder.resolve()
        is_file = folder.exists()
    except OSError as error:
        raise ConfigError(f"{field} {model} cannot be read: {error.strerror}", field=field) from None
    if is_file:
        raise ConfigError(f"{field} {model} is a file; a folder or a hub id is needed", field=field)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError(f"{field} folder {model} does not exist", field=field)
    return _download(model, files, field)


def load_tokenizer(config: EngineConfig, folder: str) -> Tokenizer | None:
    """The tokenizer the settings ask for; None when they ask for none."""
    if config.skip_tokenizer_init:
        return None
    try:
        own = model_folder(config.tokenizer, TOKENIZER_FILES, "tokenizer") if config.tokenizer else None
        return Tokenizer.load(own or folder)
    except ConfigError as error:
        hint = "give tokenizer, or skip_tokenizer_init for token ids in and out"
        raise ConfigError(f"{error.message}; {hint}", field="tokenizer") from None


def with_tokenizer(resolved: ResolvedConfig, tokenizer: Tokenizer | None) -> ResolvedConfig:
    """The same where the tokenizer's end of sequence ends one too: fine-tunes for chat often name theirs only there."""
    if tokenizer is None:
        return resolved
    model = resolved.model.with_eos(tokenizer.eos_token_ids, "the tokenizer's eos_token")
    return msgspec.structs.replace(resolved, model=model)


def log_ends(model: ModelSpec) -> None:
    """Say which ids end a sequence, and where each comes from."""
    if not model.eos_token_ids:
        logger.warning("no file names an end of sequence: only max_new_tokens, stop strings and stop ids end one")
        return
    ends = zip(model.eos_token_ids, model.eos_sources, strict=True)
    logger.info("ids that end a sequence: %s", "; ".join(f"{token_id} ({source})" for token_id, source in ends))


def begin_core(config: EngineConfig, executor: ExecutorKind) -> BegunCore:
    """Have a core's process load what takes long while its settings are decided, and so the other ranks of this host.
    Raises `ConfigError` where torch could not be loaded."""
    check_working_directory()
    assert isinstance(executor, str), "those who come to a meeting are ranks of this process"
    return begin_process(executor=executor, num_ranks=_ranks_to_begin(config) if executor == "local" else 0)


def _ranks_to_begin(config: EngineConfig) -> int:
    """As many as gain by it: more than there are cores would wait for each other, for settings that may be refused."""
    num_here = config.tp_size * config.pp_size // config.nnodes
    return max(1, min(num_here, available_cores()))


def start_core(
    resolved: ResolvedConfig, *, inprocess: bool, executor: ExecutorKind, begun: BegunCore | None = None
) -> tuple[CoreHost, FrontLink]:
    """Start a core and return what it runs in and the link to it. `begun`: a process that is there already."""
    if inprocess:
        front, core = make_pair()
        return CoreThread(resolved, core, executor), front
    begun = begun or begin_core(resolved.engine, executor)
    return begun.configure(msgspec.msgpack.encode(resolved))


def _download(model: str, files: Sequence[str], field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{field} {model!r} is no local folder and cannot be had from the hub: {reason}"
        raise ConfigError(message, field=field) from None
