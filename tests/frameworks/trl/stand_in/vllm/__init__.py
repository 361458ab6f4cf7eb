"""A stand-in for vLLM's names that TRL's server mode imports in a trainer's process. A test's tool, of which nothing is
shipped: installed, it would hide a real one. Where vLLM has NCCL it has gloo, so that it runs on a CPU.
"""

__version__ = "0.31.0"


class LLM: ...


class RequestOutput: ...


class SamplingParams: ...
