"""A trainer that speaks SGLang's dialect, as a process:
`python -m tests.server.bucket_client URL STYLE DEVICE STOP FOLDER=VERSION ...`; the folders hold what it sends in turn.

It serializes with torch's own sharing and with stand-ins for the classes of sglang that its bytes name. `STYLE` is
"slime" (flattened buckets, a label each), "verl" (named tensors, each serialized by itself, no label) or "nemo" (a
bucket for each dtype). It prints each reply as a line of JSON. Before bucket number `STOP` (-1: none has it) it stops,
says so, and waits to be killed.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from tests.weights.foreign_payloads import BUCKET_HOMES, flattened, local, serialized

BUCKET_SIZE = 6
Tensors = dict[str, torch.Tensor]


def buckets(tensors: Tensors) -> Iterator[Tensors]:
    names = list(tensors)
    for start in range(0, len(names), BUCKET_SIZE):
        yield {name: tensors[name] for name in names[start : start + BUCKET_SIZE]}


def bodies(style: str, tensors: Tensors, version: str) -> Iterator[dict[str, Any]]:
    """The bodies of /update_weights_from_tensor, as each framework makes them."""
    if style == "slime":
        for bucket in [*buckets(tensors), {}]:  # a rank without experts has an empty one
            payload = base64.b64encode(flattened(bucket)).decode()
            yield {
                "serialized_named_tensors": [payload],
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": version,
            }
    elif style == "verl":
        for bucket in buckets(tensors):
            named = local({name: [serialized(tensor)] for name, tensor in bucket.items()})
            yield {"serialized_named_tensors": [base64.b64encode(named).decode()], "load_format": None}
    else:
        halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if "norm" not in name}
        for bucket in (halves, {name: tensor for name, tensor in tensors.items() if "norm" in name}):
            payload = base64.b64encode(flattened(bucket, BUCKET_HOMES[2])).decode()
            body = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket"}
            yield {**body, "flush_cache": False, "weight_version": version}


def main(url: str, style: str, device: str, stop_before: str, *updates: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:

        def post(path: str, body: dict[str, Any]) -> None:
            reply = http.post(path, json=body)
            print(json.dumps([path, reply.status_code, reply.json()]), flush=True)

        for folder, version in (update.rsplit("=", 1) for update in updates):
            post("/pause_generation", {})
            http.get("/flush_cache").raise_for_status()
            tensors = load_file(f"{folder}/model.safetensors", device)
            for number, body in enumerate(bodies(style, tensors, version)):
                if str(number) == stop_before:
                    post("/continue_generation", {})
                    print(json.dumps(["stopped", 0, {}]), flush=True)
                    time.sleep(600)
                post("/update_weights_from_tensor", body)
            post("/continue_generation", {})
            print(json.dumps(["done", 0, {}]), flush=True)
            sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
