from typing import Any


def TokensPrompt(**given: Any) -> dict[str, Any]:
    return given
