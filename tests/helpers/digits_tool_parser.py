"""A parser of calls for vLLM: an answer of digits calls ``take`` with them.

The toy's vocabulary has digits alone, so none of vLLM's own parsers would ever find a call in it.
"""

from __future__ import annotations

import json
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.tool_parsers import ToolParser, ToolParserManager


@ToolParserManager.register_module("digits")
class DigitsToolParser(ToolParser):
    """Finds a call in an answer that is all digits."""

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        digits = model_output.removesuffix("<eos>")
        calls = []
        if digits.isdigit():
            arguments = json.dumps({"state": digits})
            calls = [ToolCall(function=FunctionCall(name="take", arguments=arguments))]
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=calls, content=None if calls else model_output
        )

    def extract_tool_calls_streaming(self, *given: Any) -> None:
        return None
