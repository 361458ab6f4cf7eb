"""KV pages and who holds them: a ref-counted pool, a radix tree of published prefixes, and leases. No tensors."""

from headrace.cache.lease_table import LeaseTable
from headrace.cache.page_pool import PagePool
from headrace.cache.radix_tree import UNIT_BYTES, Match, Namespace, RadixTree

__all__ = ["UNIT_BYTES", "LeaseTable", "Match", "Namespace", "PagePool", "RadixTree"]
