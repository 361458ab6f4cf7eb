"""What the ranks of a trainer tell one another in a push: errors and reports, as bytes over their own group.

Every exchange is a collective and takes no longer than the group's timeout. Must not know weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import msgspec

from headrace.types.errors import ErrorInfo, HeadraceError, UnavailableError, WeightUpdateError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


Result = TypeVar("Result")
_SHORT_BYTES = 256
_SIZE_BYTES = 8
_TOLD = "was_told_to_all_ranks"
"""An attribute of an error that every rank knows of: nobody tells it, or waits to be told, again."""


Error = TypeVar("Error", bound=Exception)


def told(error: Error) -> Error:
    """The error, which all ranks raise."""
    setattr(error, _TOLD, True)
    return error


class TrainerRanks:
    """The ranks that push together; with None this process alone."""

    def __init__(self, group: ProcessGroup | DeviceMesh | None) -> None:
        """See `trainer_group`."""
        self._group: ProcessGroup | None = None
        self.rank, self.num_ranks = 0, 1
        if group is not None:
            from headrace.parallel.rendezvous import trainer_group

            self._group = found = trainer_group(group, "group", WeightUpdateError)
            self.rank, self.num_ranks = found.rank(), found.size()

    def agree(self, answer: bytes | HeadraceError) -> bytes:
        """What rank 0 answers, on every rank. Raises as `tell`."""
        return self.tell(answer)[0]

    def tell(self, answer: bytes | HeadraceError, name: str = "") -> list[bytes]:
        """What every rank answers; if any of them has an error, the first of those is raised on all. `name` is what
        goes on, for messages."""
        if self.num_ranks == 1:
            if isinstance(answer, HeadraceError):
                raise answer
            return [answer]
        sent = answer.info() if isinstance(answer, HeadraceError) else answer
        answers: list[bytes] = []
        try:
            packed_answers = self._exchange(msgspec.msgpack.encode(sent), name)
        except UnavailableError as error:  # what has gone wrong here says more
            raise told(answer if isinstance(answer, HeadraceError) else error) from None
        for packed in packed_answers:
            found = msgspec.msgpack.decode(packed, type=bytes | ErrorInfo)
            if isinstance(found, ErrorInfo):
                raise told(found.to_exception())
            answers.append(found)
        return answers

    def attempt(
        self, action: Callable[[], Result], name_of: Callable[[Result], str] = lambda _: ""
    ) -> tuple[Result, list[str]]:
        """What comes of `action`, which every rank does, and its name on each. What one raises all raise: there as it
        is, elsewhere, if it is no error of ours, as a `WeightUpdateError` that names the rank. They hear of it when
        their own action is over, or comes to an attempt inside."""
        try:
            done = action()
            answer = (name := name_of(done)).encode()
        except HeadraceError as error:
            if not hasattr(error, _TOLD):
                self.tell(error)
            raise
        except Exception as error:  # the trainer's own, whatever it is
            if not hasattr(error, _TOLD):
                message = f"rank {self.rank} of the trainer: {type(error).__name__}: {error}"
                with contextlib.suppress(HeadraceError):
                    self.tell(WeightUpdateError(message, field="weights"))
            raise told(error) from None
        return done, [each.decode() for each in self.tell(answer, name)]

    def send(self, name: str, tensor: torch.Tensor) -> None:
        """To rank 0, which calls `receive`; `name` is for messages."""
        from torch import distributed

        with self._naming_silence(name):
            distributed.send(tensor.contiguous().to(self.device), group=self._group, group_dst=0)

    def receive(self, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """What `rank` sends, in a tensor like this one."""
        import torch
        from torch import distributed

        found = torch.empty_like(tensor, device=self.device)
        with self._naming_silence(name):
            distributed.recv(found, group=self._group, group_src=rank)
        return found

    def _exchange(self, message: bytes, name: str) -> list[bytes]:
        """What every rank says, in their order: the beginning with its size, then the rest of the longest."""
        sized = len(message).to_bytes(_SIZE_BYTES, "little") + message
        with self._naming_silence(name):
            parts = self._gather(sized[:_SHORT_BYTES], _SHORT_BYTES)
            sizes = [int.from_bytes(part[:_SIZE_BYTES], "little") + _SIZE_BYTES for part in parts]
            rest = max(sizes) - _SHORT_BYTES
            if rest > 0:
                parts = [a + b for a, b in zip(parts, self._gather(sized[_SHORT_BYTES:], rest), strict=True)]
        return [part[_SIZE_BYTES:size] for part, size in zip(parts, sizes, strict=True)]

    def _gather(self, message: bytes, room: int) -> list[bytes]:
        import torch
        from torch import distributed

        padded = torch.frombuffer(bytearray(message.ljust(room, b"\0")), dtype=torch.uint8).to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        distributed.all_gather(parts, padded, group=self._group)
        return [part.cpu().numpy().tobytes() for part in parts]

    @contextlib.contextmanager
    def _naming_silence(self, name: str = "") -> Iterator[None]:
        """One is gone, or has stood still for longer than the group's timeout: `UnavailableError`, naming the tensor
        that was to come."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).split("\n", maxsplit=1)[0]
            message = f"{name}: another rank of the trainer does not answer: {reason}".removeprefix(": ")
            raise UnavailableError(message, field=name or "group") from None

    @property
    def device(self) -> torch.device:
        """Where the group takes tensors from."""
        import torch
        from torch import distributed

        is_on_host = "gloo" in distributed.get_backend_config(self._group)
        return torch.device("cpu") if is_on_host else torch.device("cuda", torch.cuda.current_device())
