"""Many replicas behind one front: which of them a request goes to, and what becomes of it when one dies.

Knows a replica as an address that speaks HTTP; must not know engines. Nothing here loads torch.
"""
