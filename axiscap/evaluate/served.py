"""The provider for Inspect of a capped server, vLLM or SGLang; see :mod:`axiscap.evaluate.inspect`."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig, ModelOutput
from inspect_ai.model._model_call import ModelCall
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI
from inspect_ai.tool import ToolChoice, ToolInfo

from axiscap.evaluate.calls import Calls

#: The field of a request in which each engine expects the name of a profile.
ENGINES = {"vllm": "vllm_xargs", "sglang": "custom_params"}


class ServedModel(OpenAICompatibleAPI):
    """Inspect's provider for OpenAI-compatible servers, with a profile and an own seed in each request."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        engine: str = "vllm",
        profile: str | None = None,
        **model_args: Any,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine}")
        config = config or GenerateConfig()
        # Most private servers need no key, but the provider demands one.
        super().__init__(model_name, base_url, api_key or "none", config, service="axiscap-server", **model_args)
        self._profile_field = {} if profile is None else {ENGINES[engine]: {"axiscap": profile}}
        self._calls = Calls()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        """One answer under the profile."""
        prompt = "\n\n".join(message.text for message in input)
        changes = {
            "seed": self._calls.next_seed(prompt, config.seed),
            "extra_body": {**(config.extra_body or {}), **self._profile_field},
        }
        return await super().generate(input, tools, tool_choice, config.model_copy(update=changes))
