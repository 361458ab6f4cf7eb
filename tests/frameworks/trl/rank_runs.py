"""One of the processes of a trainer, as `accelerate launch` starts them, with its rank in the environment:
`python -m tests.frameworks.trl.rank_runs FOLDER`. It prints one line of JSON at the end. The first one has the engine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from headrace import Engine
from headrace.rl.trl import attach
from tests.frameworks.trl.training import ENGINE, POLICY, arguments, logged, right, sums


def main(folder: Path) -> dict[str, Any]:
    args = arguments(GRPOConfig, folder, max_steps=3, per_device_train_batch_size=8)
    trainer = GRPOTrainer(str(POLICY), right, args=args, train_dataset=sums())
    engine = Engine(str(POLICY), **ENGINE) if os.environ["RANK"] == "0" else None
    attached = attach(trainer, engine, verify=True)
    trainer.train()
    version = None if engine is None else engine.version
    if engine is not None:
        engine.shutdown()
    return {
        "processes": trainer.accelerator.num_processes,
        "kind": str(trainer.accelerator.distributed_type),
        "versions": [report.update.version for report in attached.policy.reports],
        "version": version,
        "differences": logged(trainer, "sampling/sampling_logp_difference/max"),
    }


if __name__ == "__main__":
    print("RESULT" + json.dumps(main(Path(sys.argv[1]))))
