"""Between text and token ids: tokenizer, exact streaming detokenizer, stop strings, chat templates, tool calls."""

from headrace.text.chat import check_template_arguments, normalize_messages, normalize_tools, tool_names
from headrace.text.detokenizer import IncrementalDetokenizer
from headrace.text.encoding import INLINE_CHARACTERS, encode_bounded, run_sized
from headrace.text.stop_strings import StopSet, StopStrings
from headrace.text.tokenizer import Tokenizer
from headrace.text.tool_calls import ToolCall, ToolCallParser, ToolCallStyle, tool_call_style

__all__ = [
    "INLINE_CHARACTERS",
    "IncrementalDetokenizer",
    "StopSet",
    "StopStrings",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "ToolCallStyle",
    "check_template_arguments",
    "encode_bounded",
    "normalize_messages",
    "normalize_tools",
    "run_sized",
    "tool_names",
    "tool_call_style",
]
