"""Rollouts: a model answers questions under system prompts. Each answer gives one mean activation per layer."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from axiscap.calibrate.endpoint import CONCURRENT, Endpoint
from axiscap.calibrate.roles import Task
from axiscap.calibrate.store import Settings, Shard, Store
from axiscap.calibrate.tokens import Collect, Text, are_ordinary
from axiscap.models import folder, stop_tokens, watched_layers

#: The published sampling.
TEMPERATURE, TOP_P = 0.7, 0.9


class Engine(Protocol):
    """Answers batches of tasks. The settings may change between two streams."""

    settings: Settings
    #: The model in this process, which reads the finished answers.
    model: Any

    def stream(self, todo: Iterable[Sequence[Task]]) -> Iterator[Shard]:
        """Yields the batches' shards as they finish. Takes a batch from `todo` only when the engine has room for it."""


def run(
    engine: Engine,
    store: Store,
    todo: Sequence[Sequence[Task]],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Answers the batches that the store does not have yet.

    Parameters
    ----------
    engine
        answers the batches.
    store
        receives the shards.
    todo
        the batches.
    progress
        called with the number of rollouts of each batch, finished now or before.
    """

    def missing() -> Iterator[Sequence[Task]]:
        for batch in todo:
            if store.has(store.name(batch)):
                progress(len(batch))
            else:
                yield batch

    for shard in engine.stream(missing()):
        store.write(store.name(shard.tasks), shard)
        progress(len(shard.tasks))


class Workers(Protocol):
    """Runs the stages of a calibration: this process, or Ray's workers (``axiscap.calibrate.cluster``)."""

    def rollouts(self, store: Store, todo: Sequence[Sequence[Task]], progress: Callable[[int], None]) -> None:
        """Answers the batches that the store does not have."""

    def over_shards(self, work: Callable[[Store, Sequence[Sequence[Task]]], Any], store: Store, todo: Any) -> list[Any]:
        """The results of `work` on the parts of `todo`, for the caller to merge."""

    def over_texts(
        self,
        work: Collect,
        store: Store,
        parts: Sequence[Sequence[Text]],
        progress: Callable[[int], None],
    ) -> Iterator[Any]:
        """Yields the result of `work` on the model and each part, in the order of the parts."""


class Here:
    """Workers that are this process, with one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def rollouts(self, store: Store, todo: Sequence[Sequence[Task]], progress: Callable[[int], None]) -> None:
        self.engine.settings = store.settings
        run(self.engine, store, todo, progress)

    def over_shards(self, work: Callable[[Store, Sequence[Sequence[Task]]], Any], store: Store, todo: Any) -> list[Any]:
        return [work(store, todo)]

    def over_texts(
        self,
        work: Collect,
        store: Store,
        parts: Sequence[Sequence[Text]],
        progress: Callable[[int], None],
    ) -> Iterator[Any]:
        for part in parts:
            yield work(self.engine.model, part)
            progress(len(part))


class TransformersEngine:
    """Answers by a transformers model, which also reads the answers.

    Parameters
    ----------
    model
        a causal LM.
    tokenizer
        its tokenizer, padding on the left. If it has no chat template, the model counts as a base model: it continues
        ``Question: ... Answer:``, and its answer ends with the line.
    settings
        of the answers.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.has_template = tokenizer.chat_template is not None
        self.system_role = self.has_template and _accepts_system_role(tokenizer)
        self.stops = stop_tokens(model)
        if not self.has_template:
            pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            self.stops += [token for token, piece in enumerate(pieces) if "\n" in piece and token not in self.stops]

    def encode(self, tasks: Sequence[Task]) -> Any:
        """The prompts as one padded batch."""
        if not self.has_template:
            texts = [task.completion() for task in tasks]
            return self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        return self.tokenizer.apply_chat_template(
            [task.messages(self.system_role) for task in tasks],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)

    def prompts(self, tasks: Sequence[Task]) -> list[list[int]]:
        """The prompts' tokens, without padding."""
        return _unpadded(self.encode(tasks))

    def stream(self, todo: Iterable[Sequence[Task]]) -> Iterator[Shard]:
        """Yields batch after batch; see :class:`Engine`."""
        for tasks in todo:
            shard = self.answer(tasks)
            means = read_means(self.model, shard.prompts, shard.answers, self.settings.norm_limits)
            yield dataclasses.replace(shard, means=means)

    @torch.inference_mode()
    def answer(self, tasks: Sequence[Task]) -> Shard:
        """Answers one batch without reading the answers: the shard's means are empty."""
        inputs = self.encode(tasks)
        tokens = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.settings.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.stops or None,
            logits_processor=[_Sampler([task.id for task in tasks], self.settings)],
        )
        answers = [self.until_stop(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
        return Shard(list(tasks), _unpadded(inputs), answers, self.texts(answers), torch.empty(len(tasks), 0, 0))

    def until_stop(self, tokens: list[int]) -> list[int]:
        """The generated tokens before the first end-of-sequence token. An empty answer keeps that token."""
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[:end] or tokens[:1]

    def texts(self, answers: list[list[int]]) -> list[str]:
        """The answers as text."""
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


class EndpointEngine:
    """Answers by an OpenAI-compatible endpoint, such as vLLM's server. The model in this process only reads them.

    Parameters
    ----------
    model
        the causal LM behind the endpoint, for the activations: a second pass over the finished texts.
    tokenizer
        its tokenizer.
    settings
        of the answers.
    base_url
        such as ``http://127.0.0.1:8000/v1``; None: ``OPENAI_BASE_URL``.
    name
        the model's name there; None: the first that the endpoint lists.

    Raises
    ------
    ValueError
        there is no address.
    ConnectionError
        the endpoint does not answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, base_url: str | None = None, name: str | None = None
    ) -> None:
        self.settings, self.model = settings, model
        self.reader = TransformersEngine(model, tokenizer, settings)
        self.endpoint = Endpoint(base_url)
        self.name = name or self.endpoint.first_model()

    def stream(self, todo: Iterable[Sequence[Task]]) -> Iterator[Shard]:
        """Yields the batches in order. The next ones are answered while one is read; see :class:`Engine`."""
        with ThreadPoolExecutor(CONCURRENT) as pool:
            requests = ([(task, pool.submit(self._ask, task)) for task in batch] for batch in todo)
            waiting = deque(islice(requests, 2))
            while waiting:
                answers = [(task, answer.result()) for task, answer in waiting.popleft()]
                waiting.extend(islice(requests, 1))
                yield self._read(answers)

    def _ask(self, task: Task) -> str:
        settings = self.settings
        return self.endpoint.chat(
            self.name,
            task.messages(self.reader.system_role),
            seed=settings.seed_of(task),
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_tokens=settings.max_new_tokens,
        ).strip()

    def _read(self, text_by_task: Sequence[tuple[Task, str]]) -> Shard:
        tasks, texts = [task for task, _ in text_by_task], [text for _, text in text_by_task]
        answers = [self.reader.tokenizer(text or "\n", add_special_tokens=False)["input_ids"] for text in texts]
        prompts = self.reader.prompts(tasks)
        means = read_means(self.model, prompts, answers, self.settings.norm_limits)
        return Shard(tasks, prompts, answers, texts, means)


class VllmEngine:
    """Answers by vLLM in this process, with continuous batching. The model here reads them (extra ``axiscap[vllm]``).

    vLLM and the model that reads share the memory of each GPU: vLLM takes 45 %.

    Parameters
    ----------
    model
        the causal LM, for the activations: a second pass over the finished answers.
    tokenizer
        its tokenizer.
    settings
        of the answers.
    """

    MAX_REQUESTS = 512  # unfinished at once

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        try:
            import vllm
        except ModuleNotFoundError:
            raise ModuleNotFoundError("--engine vllm needs vLLM: pip install 'axiscap[vllm]'") from None
        self.settings, self.model, self.vllm = settings, model, vllm
        self.reader = TransformersEngine(model, tokenizer, settings)
        self.engine = vllm.LLM(
            folder(settings.model),
            dtype=settings.dtype.removeprefix("torch."),
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            gpu_memory_utilization=0.45,
        ).llm_engine

    def stream(self, todo: Iterable[Sequence[Task]]) -> Iterator[Shard]:
        """Yields each batch when it is finished, in any order; see :class:`Engine`."""
        todo, count = iter(todo), 0
        # By number: the tasks, their prompts, and the finished answers by row.
        batches: dict[int, tuple[Sequence[Task], list[list[int]], dict[int, list[int]]]] = {}
        has_more = True
        while has_more or batches:
            while has_more and self.engine.get_num_unfinished_requests() < self.MAX_REQUESTS:
                batch = next(todo, None)
                has_more = batch is not None
                if batch is not None:
                    batches[count] = batch, self.reader.prompts(batch), {}
                    self._add(count, *batches[count][:2])
                    count += 1
            for output in self.engine.step():
                if output.finished:
                    number, row = map(int, output.request_id.split("/"))
                    batches[number][2][row] = list(output.outputs[0].token_ids)
            for number in [n for n, (batch, _, done) in batches.items() if len(done) == len(batch)]:
                yield self._read(*batches.pop(number))

    def _add(self, number: int, batch: Sequence[Task], prompts: Sequence[list[int]]) -> None:
        settings = self.settings
        for row, (task, prompt) in enumerate(zip(batch, prompts, strict=True)):
            sampling = self.vllm.SamplingParams(
                temperature=TEMPERATURE,
                top_p=TOP_P,
                max_tokens=settings.max_new_tokens,
                seed=settings.seed_of(task),
                stop_token_ids=self.reader.stops,
                output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )
            self.engine.add_request(f"{number}/{row}", {"prompt_token_ids": prompt}, sampling)

    def _read(self, batch: Sequence[Task], prompts: list[list[int]], done: dict[int, list[int]]) -> Shard:
        answers = [self.reader.until_stop(done[row]) for row in range(len(batch))]
        means = read_means(self.model, prompts, answers, self.settings.norm_limits)
        return Shard(list(batch), prompts, answers, self.reader.texts(answers), means)


@torch.inference_mode()
def read_means(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    norm_limits: Sequence[float] = (),
) -> Tensor:
    """The mean outputs of each decoder layer over each answer's tokens, (N, n_layers, H) float32, by one forward pass.

    Rows beyond their layer's norm limit (attention sinks) are left out, unless all rows of an answer are.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    position = torch.arange(longest, device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    answer_starts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    first = min(map(len, prompts))  # no answer begins before this position
    in_answer = ((position >= answer_starts) & (position < lengths))[:, first:]
    means: list[Tensor] = []

    def add_means(layer: int, hidden: Tensor) -> None:
        hidden, is_answer = hidden[:, first:], in_answer.to(hidden.device)
        ordinary = is_answer & are_ordinary(hidden, layer, norm_limits)
        counted = torch.where(ordinary.any(-1, keepdim=True), ordinary, is_answer)
        weights = counted.double() / counted.sum(-1, keepdim=True)
        means.append(torch.einsum("nt,nth->nh", weights, hidden.double()).float().cpu())

    with watched_layers(model, add_means):
        # Padding stands behind the text, so causal attention hides it from the text's tokens.
        model(input_ids=ids, attention_mask=(position < lengths).long(), use_cache=False, logits_to_keep=1)
    return torch.stack(means, dim=1)


def _unpadded(inputs: Any) -> list[list[int]]:
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in rows]


def _accepts_system_role(tokenizer: Any) -> bool:
    try:
        tokenizer.apply_chat_template(Task("", 0, 0, "s", "q").messages(True), tokenize=False)
    except Exception:  # the template's own error; which class it is depends on the template
        return False
    return True


class _Sampler:
    """A logits processor that samples (temperature 0.7, top-p 0.9) and leaves only the sampled token possible.

    Each rollout has random numbers of its own, so that its answer does not depend on the batch that it is in.
    """

    LIKELY = 256  # the nucleus is first sought among this many tokens, because sorting the whole vocabulary costs more

    def __init__(self, ids: Sequence[str], settings: Settings) -> None:
        self.numbers = torch.from_numpy(np.stack([settings.numbers(id, settings.max_new_tokens) for id in ids]))
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float() / TEMPERATURE, dim=-1)
        numbers = self.numbers[:, self.step, None].to(scores.device)
        self.step += 1
        sampled = self._sample(probabilities, numbers, self.LIKELY)
        return torch.full_like(scores, -torch.inf).scatter_(-1, sampled, 0.0)

    def _sample(self, probabilities: Tensor, numbers: Tensor, likely: int) -> Tensor:
        """A token (N, 1) from each row's nucleus, the fewest most likely tokens whose probabilities sum to TOP_P."""
        top, tokens = probabilities.topk(min(likely, probabilities.shape[-1]))
        sums = top.double().cumsum(-1)
        last = (sums < TOP_P).sum(-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
        target = numbers * sums.gather(-1, last)
        sampled = tokens.gather(-1, torch.minimum((sums <= target).sum(-1, keepdim=True), last))
        # Only the rows that need more tokens: topk may order equal probabilities differently for another k.
        is_wide = sums[:, -1] < TOP_P
        if likely < probabilities.shape[-1] and bool(is_wide.any()):
            sampled[is_wide] = self._sample(probabilities[is_wide], numbers[is_wide], likely * 16)
        return sampled
