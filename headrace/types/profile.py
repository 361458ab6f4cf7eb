"""What is asked for when a core is traced, as a value."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

Activity = Literal["CPU", "GPU"]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)


class ProfileTerms(msgspec.Struct, frozen=True):
    """`folder` "" is one of the core's own. Without `activities` all that there are are traced; without `num_steps` the
    trace goes on until it is stopped."""

    folder: str = ""
    name: str = ""
    activities: tuple[Activity, ...] = ()
    num_steps: int = 0
    with_stack: bool = False
    record_shapes: bool = False
