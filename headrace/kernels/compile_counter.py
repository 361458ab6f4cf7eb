"""How many kernels are built, or loaded from their folder. Owns the count, and needs no triton before it counts."""

from __future__ import annotations

import importlib
from typing import Any


class CompileCounter:
    """Counts Triton's compilations from `arm` on. A kernel that this process has loaded already is neither.

    num_compiled    kernels that were compiled
    num_loaded      kernels whose binary was found in the cache folder
    """

    def __init__(self) -> None:
        self.num_compiled = 0
        self.num_loaded = 0
        self._is_armed = False
        self._is_linked = False  # Triton, or a listener that came later, calls us
        self._earlier: Any = None

    @property
    def num_calls(self) -> int:
        """Every way through the compiler, whether it found a binary or made one: each stalls a step."""
        return self.num_compiled + self.num_loaded

    def arm(self) -> None:
        """Begin to count; imports triton. Whoever listened before goes on listening."""
        if not self._is_linked:
            knobs = importlib.import_module("triton.knobs").compilation
            self._earlier, knobs.listener = knobs.listener, self._observe
            self._is_linked = True
        self._is_armed = True

    def disarm(self) -> None:
        """Stop counting, and put back who listened before unless somebody came later, who still needs us to pass on."""
        if not self._is_linked:
            return
        self._is_armed = False
        knobs = importlib.import_module("triton.knobs").compilation
        if knobs.listener == self._observe:
            knobs.listener, self._earlier = self._earlier, None
            self._is_linked = False

    def _observe(self, *, cache_hit: bool, **about: Any) -> None:
        """Triton's listener: called once per compilation, at its end."""
        if self._is_armed:
            if cache_hit:
                self.num_loaded += 1
            else:
                self.num_compiled += 1
        if self._earlier is not None:
            self._earlier(cache_hit=cache_hit, **about)
