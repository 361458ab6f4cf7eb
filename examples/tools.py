"""Conversations with a tool: `python examples/tools.py`. A policy asks a calculator instead of guessing a product.

A tool is a Python function. What comes back is what a trainer learns from: ids, log-probabilities and a loss mask, in
which 1 marks what the model sampled and 0 what the tool said. docs/rollouts.md has the rest.
"""

import asyncio

from headrace import AsyncEngine, Generation
from headrace.rl.demo import TOOL_POLICY
from headrace.rl.products import calculator
from headrace.rl.rollout import RolloutLimits, RolloutLoop, new_group


async def main() -> None:
    async with AsyncEngine(TOOL_POLICY, num_threads=1, seed=0) as engine:
        limits = RolloutLimits(max_turns=3, max_tokens=256, timeout=60)
        sampling = {"max_new_tokens": 96, "temperature": 1.0}
        async with RolloutLoop(engine, tools=[calculator], sampling_params=sampling, limits=limits) as rollouts:
            group = await rollouts.run(new_group([{"role": "user", "content": "12*37=?"}], 64))
            calling = [conversation for conversation in group if any(turn.calls for turn in conversation.turns)]
            print(f"{len(calling)} of {len(group)} ask the calculator, before any training")
            for conversation in calling:
                calls = [f"{call.arguments} -> {call.content}" for turn in conversation.turns for call in turn.calls]
                sampled = f"{sum(conversation.loss_mask)} of {len(conversation.ids)} tokens sampled"
                print(f"{conversation.status}: {conversation.reply!r}, calls {calls}, {sampled}")

        # Without a loop: `chat` reads calls, and what answers them is yours.
        tool = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}
        (reply,) = await engine.chat([{"role": "user", "content": "12*37=?"}], {"max_new_tokens": 96}, tools=[tool])
        print("one reply:", reply.finish_reason, reply.message)
        assert Generation.from_json(reply.sample.to_json()) == reply.sample  # a line of a log, and back


asyncio.run(main())
