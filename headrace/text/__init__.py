"""Between text and token ids: tokenizer, exact streaming detokenizer, stop strings, chat templates, tool calls."""

from headrace.text.chat import check_template_arguments, normalize_messages, normalize_tools, tool_names
from headrace.text.detokenizer import IncrementalDetokenizer
from headrace.text.encoding import INLINE_CHARACTERS, begins_twice, encode_bounded, run_sized
from headrace.text.reply_text import ReplyText, ToolReader
from headrace.text.stop_strings import StopSet, StopStrings
from headrace.text.tokenizer import Tokenizer
from headrace.text.tool_calls import CALL_FORMS, ToolCall, ToolCallStyle, new_call_id, tool_call_style
from headrace.text.tool_parser import ToolCallParser

__all__ = [
    "CALL_FORMS",
    "INLINE_CHARACTERS",
    "IncrementalDetokenizer",
    "ReplyText",
    "StopSet",
    "StopStrings",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "ToolCallStyle",
    "ToolReader",
    "begins_twice",
    "check_template_arguments",
    "encode_bounded",
    "new_call_id",
    "normalize_messages",
    "normalize_tools",
    "run_sized",
    "tool_names",
    "tool_call_style",
]
