"""Between text and token ids: tokenizer, exact streaming detokenizer, stop strings, chat templates, tool calls."""

from headrace.text.chat import check_template_arguments, normalize_messages, normalize_tools, tool_names
from headrace.text.detokenizer import IncrementalDetokenizer
from headrace.text.stop_strings import StopStrings
from headrace.text.tokenizer import Tokenizer
from headrace.text.tool_calls import ToolCall, ToolCallParser, ToolCallStyle, tool_call_style

__all__ = [
    "IncrementalDetokenizer",
    "StopStrings",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "ToolCallStyle",
    "check_template_arguments",
    "normalize_messages",
    "normalize_tools",
    "tool_names",
    "tool_call_style",
]
