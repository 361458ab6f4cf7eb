"""`headrace merge`: convert a trainer's checkpoint (FSDP2, Megatron-Core) to a Hugging Face folder.

Prints what was written as one JSON object.
"""

from __future__ import annotations

import argparse
import json

import msgspec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder of torch.distributed.checkpoint, or of model_world_size_N_rank_R.pt")
    parser.add_argument("out", help="the Hugging Face folder to write, as a whole, at the end")
    parser.add_argument("--model", help="a folder with config.json and tokenizer, where SOURCE has none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="convert the tensors to this")
    parser.add_argument("--max-shard-bytes", type=int, help="of a file, unless one tensor has more (default: 5 GiB)")


def run(arguments: argparse.Namespace) -> int:
    from headrace.rl.merge import merge

    given = {"dtype": arguments.dtype, "max_shard_bytes": arguments.max_shard_bytes}
    options = {name: value for name, value in given.items() if value is not None}
    report = merge(arguments.source, arguments.out, arguments.model, **options)
    print(json.dumps(msgspec.to_builtins(report)), flush=True)
    return 0
