"""A small task for verl: sums, as a parquet file of prompts and as a reward function.

    python examples/verl/sums.py sums.parquet --count 256

verl loads `compute_score` from this file (`reward.custom_reward_function.path`).
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from headrace.rl.arithmetic import Problem, draw_problems, reward


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 for a reply in the asked format with the right number, else 0.0."""
    left, right = map(int, ground_truth.split("+"))
    return reward(Problem(left, right), solution_str)


def write_prompts(path: Path, count: int, seed: int) -> None:
    """`count` problems, as verl reads them: what the user says, and what the reward function is told."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": f"{problem.left}+{problem.right}"},
            "extra_info": {"index": index},
        }
        for index, problem in enumerate(draw_problems(random.Random(seed), count))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Write a parquet file of sums to work out.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write_prompts(given.path, given.count, given.seed)
    print(f"{given.count} prompts in {given.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
