"""No command is forgotten: whoever adds one to `Command` is told where else it goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import pytest

from headrace.core.commands import _CALLS
from headrace.engine.ledger import _Change
from headrace.types import messages
from headrace.types.messages import Abort, Command, Finished, Submit
from tests.core.test_commands import CALLS
from tests.engine.test_deadline_rule import NOT_TRIED, TRIED
from tests.ipc.test_codec import COMMANDS

ALL: frozenset[type] = frozenset(get_args(Command))
ANSWERED = ALL - {Submit, Abort, Finished}
WITH_DEADLINE = frozenset(kind for kind in ALL if "deadline" in kind.__struct_fields__)  # type: ignore[attr-defined]
FORGOTTEN_WITH_ITS_CORE: frozenset[type] = frozenset(
    {
        *(messages.BeginUpdate, messages.Stage, messages.AbortUpdate),  # a session ends with its core
        *(messages.ExtendUpdate, messages.StagePayload, messages.Receive, messages.Discard),
        *(messages.JoinGroup, messages.LeaveGroup),  # of a group a core is a rank, and another one is not
        *(messages.GetWeight, messages.Digest, messages.DescribeWeights, messages.GetStatus),
        *(messages.FlushCache, messages.Shutdown),
        *(messages.SlowDown, messages.FreezeGc, messages.Profile),  # of the process that is gone
    }
)
"""Calls that change nothing a restarted core would have to be told of."""

TABLES: dict[str, tuple[frozenset[type], Iterable[type]]] = {
    "_CALLS in headrace/core/commands.py, with a function of the replica": (ANSWERED, _CALLS),
    "_Change in headrace/engine/ledger.py if another core must know that it was done, else FORGOTTEN_WITH_ITS_CORE "
    "in tests/core/test_command_tables.py": (ANSWERED, {*get_args(_Change), *FORGOTTEN_WITH_ITS_CORE}),
    "CALLS in tests/core/test_commands.py": (WITH_DEADLINE, {type(make(1)) for make in CALLS.values()}),
    "COMMANDS in tests/ipc/test_codec.py": (ALL, map(type, COMMANDS)),
    "SMALL in tests/engine/test_deadline_rule.py, or NOT_TRIED there, with where its deadline is tested": (
        WITH_DEADLINE,
        {*TRIED, *NOT_TRIED},
    ),
}
"""Where commands go: which of them, and those that are there."""


@pytest.mark.parametrize("where", TABLES)
def test_every_command_is_where_commands_go(where: str) -> None:
    wanted, found = TABLES[where][0], frozenset(TABLES[where][1])
    missing, strange = (sorted(kind.__name__ for kind in kinds) for kinds in (wanted - found, found - wanted))
    assert not missing, f"{', '.join(missing)} of headrace/types/messages.py: add to {where}"
    assert not strange, f"{', '.join(strange)}: no such command; take it out of {where}"


def test_what_is_answered_says_which_call_it_is() -> None:
    """By the first field, as `refuse_command` of headrace/ipc/codec.py takes it."""
    first = {kind.__name__: kind.__struct_fields__[0] for kind in ANSWERED}  # type: ignore[attr-defined]
    assert set(first.values()) == {"call_id"}, first
