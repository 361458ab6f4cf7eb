"""What the ranks of a trainer tell one another in a push: errors and reports, as bytes over their own group.

Every exchange is a collective and takes no longer than the group's timeout. Must not know weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from headrace.types.errors import ErrorInfo, HeadraceError, UnavailableError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class TrainerRanks:
    """The ranks that push together; with None this process alone."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.num_ranks = 1 if group is None else group.size()

    def agree(self, answer: bytes | HeadraceError) -> bytes:
        """What rank 0 answers, on every rank. Raises as `tell`."""
        return self.tell(answer)[0]

    def tell(self, answer: bytes | HeadraceError) -> list[bytes]:
        """What every rank answers; if any of them has an error, the first of those is raised on all."""
        if self.num_ranks == 1:
            if isinstance(answer, HeadraceError):
                raise answer
            return [answer]
        sent = answer.info() if isinstance(answer, HeadraceError) else answer
        answers: list[bytes] = []
        try:
            packed_answers = self._exchange(msgspec.msgpack.encode(sent))
        except UnavailableError as error:  # what has gone wrong here says more
            raise (answer if isinstance(answer, HeadraceError) else error) from None
        for packed in packed_answers:
            found = msgspec.msgpack.decode(packed, type=bytes | ErrorInfo)
            if isinstance(found, ErrorInfo):
                raise found.to_exception()
            answers.append(found)
        return answers

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

    def _exchange(self, message: bytes) -> list[bytes]:
        """What every rank says, in their order."""
        import torch
        from torch import distributed

        device = self.device
        with self._naming_silence():
            size = torch.tensor([len(message)], device=device)
            sizes = [torch.empty_like(size) for _ in range(self.num_ranks)]
            distributed.all_gather(sizes, size, group=self._group)
            room = max(int(each) for each in sizes)
            padded = torch.frombuffer(bytearray(message.ljust(room, b"\0")), dtype=torch.uint8).to(device)
            parts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
            distributed.all_gather(parts, padded, group=self._group)
        return [bytes(part.cpu().numpy().tobytes()[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

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
