"""What the demos may be told. Apart from them, so that the command line can ask without loading an engine."""

from __future__ import annotations

import msgspec

from headrace.types.errors import ConfigError


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `headrace demo` may be told. Raises `ConfigError` naming the option.

    output_dir      folder for the picture, the rollouts, and the first and last weights
    tools           learn to call a calculator, in conversations of several turns
    steps           training steps (None: 60, with tools 30)
    seed            draws the problems and the samples
    push            give the engine the trained weights; without, it samples from the first ones for ever
    num_groups      problems per step (None: 32, with tools 16)
    group_size      samples per problem
    learning_rate   of Adam
    num_threads     torch threads of the trainer; more are faster only where no one else uses the cores
    """

    output_dir: str = "demo-output"
    tools: bool = False
    steps: int | None = None
    seed: int = 0
    push: bool = True
    num_groups: int | None = None
    group_size: int = 16
    learning_rate: float = 2e-4
    num_threads: int = 1

    def __post_init__(self) -> None:
        bounds = {"steps": 1, "seed": 0, "num_groups": 1, "group_size": 2, "num_threads": 1}
        for name, low in bounds.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, got {value}", field=name)
        if not 0 < self.learning_rate <= 1:
            raise ConfigError(f"learning_rate must be in (0, 1], got {self.learning_rate}", field="learning_rate")

    @property
    def step_count(self) -> int:
        return self.steps or (30 if self.tools else 60)

    @property
    def group_count(self) -> int:
        return self.num_groups or (16 if self.tools else 32)
