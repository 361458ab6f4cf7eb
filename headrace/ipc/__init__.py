"""Links between a front and a core: one socketpair, or two queues in one process. Owns framing, bounds, peer death,
and the core's pulse.

Torch-free. Knows the message types and nothing of what they do.
"""

from headrace.ipc.buffers import SharedBuffer
from headrace.ipc.descriptors import keep_standard_numbers
from headrace.ipc.inprocess import make_pair
from headrace.ipc.links import CoreLink, FrontLink, PeerClosed
from headrace.ipc.pulse import Phase, Pulse, PulsePage, PulseReading
from headrace.ipc.spawn import BegunCore, CoreProcess, begin_process, start_process

__all__ = [
    "BegunCore",
    "CoreLink",
    "CoreProcess",
    "FrontLink",
    "PeerClosed",
    "Phase",
    "Pulse",
    "PulsePage",
    "PulseReading",
    "SharedBuffer",
    "begin_process",
    "keep_standard_numbers",
    "start_process",
    "make_pair",
]
