"""One engine for all ranks of a trainer: `torchrun --nproc-per-node 2 examples/verl_engine.py`.

The model is sharded over the ranks by FSDP2; every rank makes every call, and gets the same answer.
"""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3ForCausalLM

from headrace.rl import VerlEngine
from headrace.rl.demo import POLICY

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tp",))
model = fully_shard(Qwen3ForCausalLM.from_pretrained(POLICY, dtype=torch.float32), mesh=mesh)

with VerlEngine(mesh, model_path=str(POLICY), tp_size=1, num_threads=1) as engine:
    for step in range(2):
        report = engine.update_weights_from_tensor(model.state_dict().items(), weight_version=step)
        reply = engine.generate("17+25=", {"temperature": 0, "max_new_tokens": 8}, return_logprob=True)
        if mesh.get_rank() == 0:
            print(f"version {reply['meta_info']['weight_version']} of {report.num_tensors} tensors: {reply['text']!r}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)  # stands for a training step

distributed.destroy_process_group()
