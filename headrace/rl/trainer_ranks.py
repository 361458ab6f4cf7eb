"""What the ranks of a trainer tell one another in a push: errors and reports, as bytes over their own group.

Every exchange is a collective and takes no longer than the group's timeout. Must not know weights.
"""

from __future__ import annotations

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
        """What rank 0 answers, on every rank; if any of them has an error, the first of those is raised on all."""
        if self.num_ranks == 1:
            answers = [answer]
        else:
            sent = answer.info() if isinstance(answer, HeadraceError) else answer
            codec = msgspec.msgpack.Decoder(bytes | ErrorInfo)
            answers = [
                found.to_exception() if isinstance(found, ErrorInfo) else found
                for found in map(codec.decode, self._exchange(msgspec.msgpack.encode(sent)))
            ]
        for found in answers:
            if isinstance(found, HeadraceError):
                raise found
        return answers[0]  # type: ignore[return-value]

    def _exchange(self, message: bytes) -> list[bytes]:
        """What every rank says, in their order."""
        import torch
        from torch import distributed

        device = self.device
        try:
            size = torch.tensor([len(message)], device=device)
            sizes = [torch.empty_like(size) for _ in range(self.num_ranks)]
            distributed.all_gather(sizes, size, group=self._group)
            room = max(int(each) for each in sizes)
            padded = torch.frombuffer(bytearray(message.ljust(room, b"\0")), dtype=torch.uint8).to(device)
            parts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
            distributed.all_gather(parts, padded, group=self._group)
        except RuntimeError as error:  # one is gone, or has stood still for longer than the group's timeout
            reason = str(error).split("\n", maxsplit=1)[0]
            raise UnavailableError(f"another rank of the trainer does not answer: {reason}", field="group") from None
        return [bytes(part.cpu().numpy().tobytes()[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the group takes tensors from."""
        import torch
        from torch import distributed

        is_on_host = "gloo" in distributed.get_backend_config(self._group)
        return torch.device("cpu") if is_on_host else torch.device("cuda", torch.cuda.current_device())
