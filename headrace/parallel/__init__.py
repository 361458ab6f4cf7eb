"""What ranks that hold a model together are to each other. Must not know models, plans or processes."""

from headrace.parallel.communicator import Communicator, GroupCommunicator, Reduction
from headrace.parallel.links import StageLink
from headrace.parallel.mesh import SINGLE, Mesh

__all__ = ["SINGLE", "Communicator", "GroupCommunicator", "Mesh", "Reduction", "StageLink"]
