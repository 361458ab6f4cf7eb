"""Many replicas without a device: the router's policies and the scheduler as they are, driven by a model of step times.

Must not know engines, servers or torch.
"""
