"""What others make of tokens that were sampled: log-probabilities as recorded beside those of a checkpoint or a server.

Must not know how either computes them.
"""
