"""The provider for Inspect of a transformers model in this process, capped; see :mod:`axiscap.evaluate.inspect`."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
import numpy as np
import torch
import transformers
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    GenerateConfig,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.model._providers.hf import HuggingFaceAPI, chat_completion_assistant_message
from inspect_ai.model._providers.util import HFHandler
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolChoice, ToolInfo
from torch import Tensor

from axiscap import CapProfile, Installation, install, models
from axiscap.evaluate.calls import Calls

#: A batch waits for this many seconds for another request, as long as requests arrive.
GATHER = 0.2
#: The most tokens of an answer if the task has no limit.
MAX_TOKENS = 2048


@dataclass(frozen=True)
class Sampling:
    """The sampling that all requests of one batch share."""

    max_tokens: int
    temperature: float  # 0: the likeliest token
    top_p: float
    top_k: int  # 0: any
    stops: tuple[str, ...]


@dataclass
class Answer:
    """A generated text. The attribute ``output`` is the interface of Inspect's own code.

    ``rows`` is what the profile did, by layer; see :mod:`axiscap.evaluate.inspect`.
    """

    output: str
    input_tokens: int
    output_tokens: int
    rows: dict[str, dict[str, float | None]]


@dataclass
class Request:
    """A prompt that waits for its answer."""

    prompt: str
    sampling: Sampling
    seed: int
    answer: Future[Answer] = field(default_factory=Future)


class CappedModel(HuggingFaceAPI):
    """Inspect's ``hf`` provider under a cap. An answer does not depend on its batch."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        profile: str | None = None,
        positions: Literal["all", "generated"] = "all",
        dtype: str = "auto",
        **model_args: Any,
    ) -> None:
        model_args.setdefault("model_path", models.folder(model_name))
        device = torch.device(model_args.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
        model_args["dtype"] = models.weights_dtype(dtype, on_gpu=device.type != "cpu")
        super().__init__(model_name, base_url, api_key, config or GenerateConfig(), **model_args)
        self.model.eval()
        self.cap: Installation | None = None
        if profile is not None:
            self.profile = CapProfile.load(profile)
            self.cap = install(self.model, self.profile, positions=positions)
        self._calls = Calls()
        self._waiting: list[Request] = []
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        """Cancels the requests that wait, and releases the model."""
        self._thread.shutdown(cancel_futures=True)
        super().close()

    def max_connections(self) -> int:
        """The number of requests in a batch."""
        return int(self.batch_size or 32)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer. Concurrent requests with the same sampling are generated as one batch."""
        sampling = Sampling(
            config.max_tokens or MAX_TOKENS,
            (1.0 if config.temperature is None else config.temperature) if self.do_sample else 0.0,
            1.0 if config.top_p is None else config.top_p,
            config.top_k or 0,
            tuple(config.stop_seqs or ()),
        )
        prompt = self.hf_chat(input, tools)
        sample = sample_state()
        request = Request(prompt, sampling, self._calls.next_seed(prompt, config.seed))
        self._waiting.append(request)
        self._thread.submit(self._answer_next_batch)
        try:
            while not request.answer.done():
                await anyio.sleep(0.02)
        finally:
            request.answer.cancel()  # Inspect gave the sample up; without effect on a finished answer
        answer = request.answer.result()
        if self.cap and sample:
            sample.metadata.setdefault("axiscap", []).append(answer.rows)
        handler = HFHandler(self.model_name, self.model_family()) if tools else None
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=chat_completion_assistant_message(answer, tools, handler, self.model_name),
                    stop_reason="max_tokens" if answer.output_tokens == sampling.max_tokens else "stop",
                )
            ],
            usage=ModelUsage(
                input_tokens=answer.input_tokens,
                output_tokens=answer.output_tokens,
                total_tokens=answer.input_tokens + answer.output_tokens,
            ),
        )

    def _answer_next_batch(self) -> None:
        """Answers the oldest request together with others of the same sampling. One call for each request."""
        before = 0
        while before < len(self._waiting) < self.max_connections():  # more requests arrive
            before = len(self._waiting)
            time.sleep(GATHER)
        waiting = self._waiting[:]
        batch = [request for request in waiting if request.sampling == waiting[0].sampling][: self.max_connections()]
        for request in batch:
            self._waiting.remove(request)
        batch = [request for request in batch if request.answer.set_running_or_notify_cancel()]
        if not batch:  # another batch answered the request, or it was cancelled
            return
        try:
            for request, answer in zip(batch, self._answer(batch), strict=True):
                request.answer.set_result(answer)
        except Exception as error:  # every request that waits raises it
            for request in batch:
                request.answer.set_exception(error)

    @torch.inference_mode()
    def _answer(self, batch: list[Request]) -> list[Answer]:
        sampling = batch[0].sampling
        inputs = self.tokenizer(
            [request.prompt for request in batch], return_tensors="pt", padding=True, **(self.tokenizer_call_args or {})
        ).to(self.model.device)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": sampling.max_tokens}
        options["pad_token_id"] = self.tokenizer.pad_token_id
        if sampling.temperature > 0:
            options["logits_processor"] = _sampler(sampling, [request.seed for request in batch])
        if sampling.stops:
            stop = transformers.StopStringCriteria(self.tokenizer, list(sampling.stops))
            options["stopping_criteria"] = [stop]
        passes: list[dict[int, Tensor]] = []
        leave = self.cap.watch(passes.append) if self.cap else None
        try:
            tokens = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        finally:
            if leave:
                leave()
        ends = models.stop_tokens(self.model)
        answers = []
        for row, generated in enumerate(tokens.tolist()):
            length = next((count for count, token in enumerate(generated, start=1) if token in ends), len(generated))
            text = self.tokenizer.decode(
                generated[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            prompt = int(inputs["attention_mask"][row].sum())
            answers.append(Answer(text, prompt, length, self._rows(passes[:length], row)))
        return answers

    def _rows(self, passes: list[dict[int, Tensor]], row: int) -> dict[str, dict[str, float | None]]:
        """The statistics of one answer, by layer. The last token has no row, because it is never fed back."""
        by_layer: dict[str, dict[str, float | None]] = {}
        for index, layer in enumerate(self.profile.layers if self.cap else ()):
            projections = torch.cat([by_pass[layer][row] for by_pass in passes]).cpu()  # (tokens, K)
            projections = projections[projections.isfinite().all(-1)]
            fired = (projections < self.profile.floors[index]).any(-1)
            by_layer[str(layer)] = {
                "rows": len(projections),
                "fired": int(fired.sum()),
                "lowest": projections[:, 0].min().item() if len(projections) else None,
                "mean": projections[:, 0].mean().item() if len(projections) else None,
            }
        return by_layer


def _sampler(sampling: Sampling, seeds: list[int]) -> list[Any]:
    """Processors that leave one possible token, which depends only on the logits and the seed of the row."""
    steps: list[Any] = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(sampling.top_p))
    return [*steps, _Draw(seeds)]


class _Draw:
    """Draws the next token of each row by the inverse of the cumulated probabilities."""

    def __init__(self, seeds: list[int]) -> None:
        self.streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums = torch.softmax(scores.double(), dim=-1).cumsum(-1)
        numbers = torch.tensor([[stream.random()] for stream in self.streams], device=scores.device) * sums[:, -1:]
        tokens = (sums <= numbers).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)
