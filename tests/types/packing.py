"""What a runner does with its results, in small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_floats(values: Sequence[float]) -> bytes:
    """Log-probabilities as little-endian float32 bytes."""
    return np.asarray(values, dtype="<f4").tobytes()
