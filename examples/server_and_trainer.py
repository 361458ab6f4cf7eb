"""A server and a trainer, two processes: `python examples/server_and_trainer.py [URL]`.

URL is that of a server that runs (`headrace serve MODEL`, on this machine or another, of this model); without one the
trainer starts a server process that ends with it. Tensors go through shared memory where both see it.
"""

import sys

import torch
from transformers import Qwen3ForCausalLM

from headrace import Client, Runtime
from headrace.rl import push_weights
from headrace.rl.demo import POLICY

MESSAGES = [{"role": "user", "content": "17+25=?"}]

model = Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
with Client(sys.argv[1]) if len(sys.argv) > 1 else Runtime(POLICY, num_threads=1) as server:
    for step in range(3):
        report = push_weights(server, model, version=step, verify=True)
        (reply,) = server.chat(MESSAGES, {"temperature": 0, "max_new_tokens": 16})
        print(f"{report.update.num_tensors} tensors live as version {server.status().version}: {reply.sample.text!r}")
        assert reply.sample.version_spans == [(str(step), len(reply.sample.token_ids))]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)  # stands for a training step
