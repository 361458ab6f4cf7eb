"""The numbers 0 to 2 among a process's open files. Owns the rule that they are never one of ours."""

from __future__ import annotations

import os

_NUM_STANDARD = 3


def keep_standard_numbers() -> None:
    """Put the null device wherever a standard stream was closed, for good.

    The next file would get its number otherwise, a link or a shared buffer, and whatever then prints to standard error
    would write there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _NUM_STANDARD:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
