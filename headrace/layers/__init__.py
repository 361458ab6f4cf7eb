"""Layers of a decoder, each over parameters it is given. Must not know plans or checkpoints; ranks are `sharded`'s."""
