"""Push new weights while requests run: `python examples/push_while_generating.py`.

With `in_flight="keep"` a running request goes on under the new weights, and its spans say which made which token.
"""

import threading

import torch
from transformers import Qwen3ForCausalLM

from headrace import Engine, SamplingParams
from headrace.rl import push_weights
from headrace.rl.demo import POLICY

model = Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
with torch.no_grad():
    model.model.norm.weight.mul_(1.01)  # stands for a training step

with Engine(model=str(POLICY), num_threads=1) as engine:
    params = SamplingParams(n=8, max_new_tokens=256, ignore_eos=True, seed=1)
    spans: list[list[tuple[str, int]]] = [[] for _ in range(params.n)]
    is_running = threading.Event()

    def generate() -> None:
        for piece in engine.stream(prompts="Count: ", sampling_params=params):
            spans[piece.index].extend(piece.version_spans)
            is_running.set()

    generating = threading.Thread(target=generate)
    generating.start()
    is_running.wait()
    report = push_weights(engine, model, version="tuned", in_flight="keep", verify=True)
    generating.join()

    print(f"updated {report.update.num_tensors} tensors; no step ran for {report.update.pause_ms:.2f} ms")
    for index, pieces in enumerate(spans):
        counts = {version: sum(count for v, count in pieces if v == version) for version, _ in pieces}
        print(f"request {index}: {counts}")
    print(f"live version: {engine.version}")
