"""Settings of a router. Owns their names, defaults and bounds; every field is a flag of `headrace router`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from headrace.cluster.policies import POLICY_NAMES, PolicyName
from headrace.cluster.resumption import RESUME_MODES, ResumeMode
from headrace.server.options import check_local, from_keywords, settle_key
from headrace.types.errors import ConfigError
from headrace.types.plain_values import as_choice, as_seconds

_KEYS = ("api_key", "admin_api_key", "replica_api_key", "replica_admin_api_key")
_SECONDS = ("connect_timeout", "answer_timeout", "control_timeout", "body_timeout", "write_timeout")


class RouterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How replicas are offered as one server.

    policy                      which replica a request goes to: the least expected cost by what each was sent before,
                                in turn, the fewest requests, or the fewest tokens
    api_key                     bearer key of every route but health and pages without data; None: any bearer passes.
                                Prefer the file, or HEADRACE_API_KEY in the environment of `headrace router`
    admin_api_key               bearer key of control routes and /workers; None: they take `api_key`. Prefer the file,
                                or HEADRACE_ADMIN_API_KEY
    api_key_file                file that holds `api_key`
    admin_api_key_file          file that holds `admin_api_key`
    replica_api_key             key that the replicas want; None: `api_key`, and without that what the client sent.
                                Prefer the file, or HEADRACE_REPLICA_API_KEY
    replica_admin_api_key       key of the replicas' control routes; None: `admin_api_key`, else `replica_api_key`.
                                Prefer the file, or HEADRACE_REPLICA_ADMIN_API_KEY
    replica_api_key_file        file that holds `replica_api_key`
    replica_admin_api_key_file  file that holds `replica_admin_api_key`
    allowed_hosts               further names by which clients may call a router without a key; "*": any name
    insecure                    allow a non-loopback address without `api_key`
    access_log                  log every answer at info: client, method, path, status, bytes and ms, and why it was
                                refused if it was
    resume                      what a replica that dies had begun goes on elsewhere: "streams", or "all" (whole answers
                                too, whose tokens the router then gets one by one, which costs it more); "off": a
                                stream ends with a retryable error, and whole answers are begun anew
    max_attempts                replicas that are tried for one data call before it fails
    wait_timeout                seconds a data call waits while no replica is healthy, before 503
    connect_timeout             seconds a replica may take to accept a connection
    answer_timeout              seconds a replica may be silent before a data call to it fails
    control_timeout             seconds each replica has for a control call that goes to all
    stuck_timeout               seconds a replica may be unhealthy before what it was asked is asked elsewhere
    max_index_blocks            of each replica so many blocks (256 bytes) of prompts are remembered
    max_body_bytes              largest request body; more is answered 413
    body_timeout                seconds a client may take to send its body
    write_timeout               seconds a client may leave an answer unread
    drain_timeout               seconds running requests get to finish on shutdown before they are cut off
    """

    policy: PolicyName = "cache_aware"
    api_key: str | None = None
    admin_api_key: str | None = None
    api_key_file: str | None = None
    admin_api_key_file: str | None = None
    replica_api_key: str | None = None
    replica_admin_api_key: str | None = None
    replica_api_key_file: str | None = None
    replica_admin_api_key_file: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False
    access_log: bool = False
    resume: ResumeMode = "streams"
    max_attempts: int = 3
    wait_timeout: float = 30.0
    connect_timeout: float = 5.0
    answer_timeout: float = 3600.0
    control_timeout: float = 600.0
    stuck_timeout: float = 10.0
    max_index_blocks: int = 1 << 16
    max_body_bytes: int = 64 << 20
    body_timeout: float = 60.0
    write_timeout: float = 300.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        as_choice(self.policy, POLICY_NAMES, "policy", ConfigError)
        as_choice(self.resume, RESUME_MODES, "resume", ConfigError)
        for name in _KEYS:
            settle_key(self, name)
        for name in _SECONDS:
            as_seconds(getattr(self, name), name, ConfigError)
        for name in ("wait_timeout", "stuck_timeout", "drain_timeout"):
            if not 0 <= getattr(self, name) <= 1e9:
                raise ConfigError(f"{name} must be in [0, 1e9] seconds", field=name)
        for name, least in (("max_attempts", 1), ("max_index_blocks", 0), ("max_body_bytes", 1024)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}", field=name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouterOptions:
        """Build from keywords; an unknown or ill-typed one raises `ConfigError` naming it."""
        return from_keywords(cls, values, "a router setting")

    def check_address(self, host: str) -> None:
        """Raise `ConfigError` if routing on `host` would expose replicas that anybody may steer."""
        if self.api_key is None and not self.insecure:
            check_local(host)

    @property
    def data_key(self) -> str | None:
        """The key that replicas are sent with data calls; None: what the client sent."""
        return self.replica_api_key or self.api_key

    @property
    def admin_key(self) -> str | None:
        """The key that replicas are sent with control calls; None: what the client sent."""
        return self.replica_admin_api_key or self.replica_api_key or self.admin_api_key or self.api_key
