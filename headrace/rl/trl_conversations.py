"""Conversations with tools as the rollouts of a TRL trainer. Owns the columns that TRL gets of them, and the thread in
which their loop runs: a trainer calls from threads with an event loop, as a notebook's, and from such without one.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from headrace.rl.conversations import Conversation, new_group
from headrace.rl.rollout import RolloutLoop
from headrace.types.errors import RequestError


class ConversationRollouts:
    """Runs one conversation for each prompt; those of equal prompts in a row are a group."""

    def __init__(self, loop: RolloutLoop) -> None:
        self._loop = loop
        self._runner = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1, "headrace-trl-rollouts")
        weakref.finalize(self, _end, self._runner, self._thread).atexit = False

    def run(self, prompts: list[Any]) -> dict[str, Any]:
        """The columns of TRL's `rollout_func`, each a list in the order of `prompts`. Raises the error of a
        conversation of which nothing came, and `RequestError` for prompts that are no messages."""
        if not all(isinstance(prompt, list) for prompt in prompts):
            raise RequestError("prompts must be messages for a loop of conversations", field="prompts")
        groups = [list(same) for _, same in itertools.groupby(prompts)]
        conversations = [each for group in groups for each in new_group(group[0], len(group))]
        over = self._thread.submit(lambda: self._runner.run(self._loop.run(conversations))).result()
        for each in over:
            if not each.ids:
                raise _reason(each)
        return {
            "prompt_ids": [each.prompt_ids for each in over],
            "completion_ids": [each.ids for each in over],
            "logprobs": [each.logprobs for each in over],
            "env_mask": [each.loss_mask for each in over],
            "weight_version": [_version(each) for each in over],
            "rollout_status": [each.status for each in over],
            "rollout_turns": [len(each.turns) for each in over],
            "rollout_reward": [each.reward for each in over],
        }


def _end(runner: asyncio.Runner, thread: ThreadPoolExecutor) -> None:
    """A loop is closed in the thread that it ran in; nobody waits, who drops this may be that thread."""
    thread.submit(runner.close)
    thread.shutdown(wait=False)


def _reason(conversation: Conversation) -> Exception:
    """Why it has no tokens."""
    if conversation.error is not None:
        return conversation.error.to_exception()
    return RequestError(f"nothing came of a conversation: {conversation.status}", field="prompts")


def _version(conversation: Conversation) -> str:
    """That of the last token that was sampled."""
    return next((version for version, _ in reversed(conversation.spans) if version is not None), "")
