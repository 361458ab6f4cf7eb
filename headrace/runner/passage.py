"""What one step takes from the stage before and hands to the one after. Owns that it does both, and each once, whatever
fails in between: the next step would get another's. Must not know plans."""

from __future__ import annotations

from types import TracebackType

from torch import Tensor

from headrace.parallel import Mesh
from headrace.types.plan import RankLost


class Passage:
    """The stream of hidden states of one step through a stage of several. `hidden_TX` is memory for what comes; what is
    handed on by a step that failed are zeros, of which nothing counts."""

    def __init__(self, mesh: Mesh, hidden_TX: Tensor) -> None:
        self._before, self._after = mesh.before, mesh.after
        self._hidden_TX = hidden_TX

    def __enter__(self) -> Passage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, RankLost):
            self.skip()

    def skip(self) -> None:
        """What is left to do, without a step."""
        if self._before is not None:
            self.take()
        if self._after is not None:
            self.give(self._hidden_TX.zero_())

    def take(self) -> Tensor:
        """The stream as the stage before leaves it."""
        before, self._before = self._before, None
        assert before is not None, "the first stage takes nothing"
        before.receive_(self._hidden_TX)
        return self._hidden_TX

    def give(self, hidden_TX: Tensor) -> None:
        """The stream as this stage leaves it."""
        after, self._after = self._after, None
        assert after is not None, "the last stage gives nothing"
        after.send(hidden_TX)
