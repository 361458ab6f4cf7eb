"""A trainer that speaks vLLM's dialect, as a process: `python -m tests.server.vllm_client URL PACKED FOLDER ...`.

It does what TRL's client does, in its order: it is rank 0, asks over HTTP in the background and broadcasts meanwhile,
over gloo, or where the server is on a device over NCCL, from the last device. `PACKED` is the size of a packed buffer,
or 0. It prints each reply as a line of JSON, and waits for a line after each update.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from tests.free_ports import free_port

DEFAULT_PACKED_BYTES = 1 << 30


def stateless_group(port: int, world_size: int) -> Any:
    """A gloo group in the steps of vLLM's `stateless_init_torch_distributed_process_group`."""
    from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo
    from torch.distributed.rendezvous import rendezvous

    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    store, rank, world_size = next(rendezvous(address, 0, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return ProcessGroupGloo(PrefixStore(address, store), rank, world_size, timeout=timeout)


class StatelessNccl:
    """Rank 0 of a communicator, in the steps of vLLM's `PyNcclCommunicator`; `publish` tells the others its id."""

    def __init__(self, publish: Callable[[bytes], object], world_size: int, device: torch.device) -> None:
        self.library, self.communicator = ctypes.CDLL("libnccl.so.2"), ctypes.c_void_p()
        unique_id = _UniqueId()
        self.check(self.library.ncclGetUniqueId(ctypes.byref(unique_id)))
        publish(bytes(unique_id))
        torch.cuda.set_device(device)
        self.check(self.library.ncclCommInitRank(ctypes.byref(self.communicator), world_size, unique_id, 0))
        number = torch.zeros(1, device=device)
        address = ctypes.c_void_p(number.data_ptr())
        count, float32, is_sum = ctypes.c_size_t(1), 7, 0
        self.check(
            self.library.ncclAllReduce(address, address, count, float32, is_sum, self.communicator, self.stream())
        )
        torch.cuda.current_stream().synchronize()

    def broadcast(self, tensor: torch.Tensor) -> None:
        address, count = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel())
        dtype = {torch.uint8: 1, torch.float32: 7, torch.bfloat16: 9}[tensor.dtype]
        self.check(self.library.ncclBroadcast(address, address, count, dtype, 0, self.communicator, self.stream()))
        torch.cuda.current_stream().synchronize()

    def check(self, result: int) -> None:
        assert result == 0, f"NCCL: error {result}"

    def stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def publish_in_store(port: int, world_size: int, unique_id: bytes) -> Any:
    """In the steps of vLLM's `StatelessProcessGroup`. The store lives as long as what is returned."""
    from torch._C._distributed_c10d import TCPStore

    from tests.weights.test_unique_id import pickled

    listener = socket.create_server(("127.0.0.1", port))
    terms: dict[str, Any] = {"timeout": timedelta(seconds=60), "use_libuv": False}
    store = TCPStore("127.0.0.1", port, world_size, True, master_listen_fd=listener.detach(), **terms)
    store.set("broadcast_from/0/0", pickled(unique_id))  # type: ignore[arg-type]
    return store


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * 128),)


def packed(tensors: list[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """What vLLM's `packed_nccl_broadcast_producer` broadcasts of them."""
    chunk: list[torch.Tensor] = []
    total = 0
    for tensor in tensors:
        chunk.append(tensor.contiguous().view(torch.uint8).view(-1))
        total += chunk[-1].numel()
        if total > size:
            yield torch.cat(chunk)
            chunk, total = [], 0
    if chunk:
        yield torch.cat(chunk)


class Client:
    """What TRL's `VLLMClient` asks of a server."""

    def __init__(self, url: str, packed_bytes: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.packed_bytes = packed_bytes
        self.pool = ThreadPoolExecutor(1)
        assert self.get("/health") is None
        self.model = self.get("/v1/models")["data"][0]["id"]
        config = self.get("/server_info?config_format=json")["vllm_config"]
        self.backend = config["weight_transfer_config"]["backend"]
        assert config["lora_config"] is None
        last = torch.cuda.device_count() - 1
        self.device = torch.device("cpu") if self.backend == "gloo" else torch.device("cuda", last)
        assert config["model_config"]["logprobs_mode"] == "processed_logprobs"
        self.group = self.join()

    def get(self, path: str) -> Any:
        return self.read(path, self.http.get(path))

    def post(self, path: str, body: Any = None) -> Any:
        return self.read(path, self.http.post(path) if body is None else self.http.post(path, json=body))

    def read(self, path: str, reply: httpx.Response) -> Any:
        found = reply.json() if reply.content else None
        print(json.dumps([path, reply.status_code, found]), flush=True)
        assert reply.status_code == 200, reply.text
        return found

    def meanwhile(self, path: str, body: Any, work: Callable[[], Any]) -> Any:
        """What comes of `work` while the server is asked."""
        asked = self.pool.submit(self.post, path, body)
        found = work()
        asked.result(60)
        return found

    def join(self) -> Any:
        world_size, port = self.get("/get_world_size")["world_size"] + 1, free_port()
        info = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": world_size}
        if self.packed_bytes == DEFAULT_PACKED_BYTES:
            info["packed"] = True

        def work() -> Any:
            if self.backend == "gloo":
                return stateless_group(port, world_size)
            publish = lambda found: setattr(self, "store", publish_in_store(port, world_size, found))  # noqa: E731
            return StatelessNccl(publish, world_size, self.device)

        return self.meanwhile("/init_weight_transfer_engine", {"init_info": info}, work)

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        for tensor in packed(tensors, self.packed_bytes) if self.packed_bytes else tensors:
            if self.backend == "gloo":
                self.group.broadcast([tensor], broadcast_root()).wait()
            else:
                self.group.broadcast(tensor)

    def update(self, folder: str, num_calls: int = 3) -> None:
        """A whole update, in a few calls."""
        loaded = load_file(f"{folder}/model.safetensors")
        tensors = {name: each.to(self.device, torch.bfloat16) for name, each in loaded.items()}
        self.post("/start_weight_update", {})
        names = list(tensors)
        size = -(-len(names) // num_calls)
        for start in range(0, len(names), size):
            part = names[start : start + size]
            info: dict[str, Any] = {
                "names": part,
                "dtype_names": ["bfloat16"] * len(part),
                "shapes": [list(tensors[name].shape) for name in part],
            }
            if self.packed_bytes not in (0, DEFAULT_PACKED_BYTES):
                info |= {"packed": True, "packed_buffer_size_bytes": self.packed_bytes, "packed_num_buffers": 2}
            sending = lambda part=part: self.broadcast([tensors[name] for name in part])  # noqa: E731
            self.meanwhile("/update_weights", {"update_info": info}, sending)
        self.post("/finish_weight_update", {})
        self.post("/reset_prefix_cache")


def broadcast_root() -> Any:
    from torch._C._distributed_c10d import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return options


def main(url: str, packed_bytes: str, *folders: str) -> None:
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, as NCCL does, is no reply
    client = Client(url, int(packed_bytes))
    for folder in folders:
        client.update(folder)
        print(json.dumps(["done", 0, {}]), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
