"""A small task with a tool for verl: products, which the policy may ask a calculator for.

    python examples/verl/products.py products.parquet --count 256

verl loads `compute_score` from this file (`reward.custom_reward_function.path`), and `Calculator` by its name
(`examples/verl/calculator.yaml`).
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

from headrace.rl.products import calculator, draw_products, product_reward


class Calculator(BaseTool):
    """Works out a product. A call that is no product is answered with what is wrong."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **_: Any) -> tuple[ToolResponse, float, dict]:
        try:
            return ToolResponse(text=str(calculator(str(parameters.get("expression"))))), 0.0, {}
        except ValueError as error:
            return ToolResponse(text=str(error)), 0.0, {}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1.0 for a last reply in the asked format with the right number, else 0.0."""
    return product_reward(int(ground_truth), solution_str.rpartition("assistant\n")[2])


def write_prompts(path: Path, count: int, seed: int) -> None:
    """`count` problems, as verl reads them: what the user says, and what the reward function is told."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "data_source": "products",
            "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
            "extra_info": {"index": index},
        }
        for index, problem in enumerate(draw_products(random.Random(seed), count))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Write a parquet file of products to work out.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    write_prompts(given.path, given.count, given.seed)
    print(f"{given.count} prompts in {given.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
