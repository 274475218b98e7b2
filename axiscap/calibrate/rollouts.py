"""Rollouts: a model answers questions under system prompts, and each answer becomes one vector a layer."""

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

from axiscap.calibrate.data import Task
from axiscap.calibrate.endpoint import CONCURRENT, Endpoint
from axiscap.calibrate.store import Settings, Shard, Store
from axiscap.calibrate.tokens import Collect, Text, are_ordinary
from axiscap.models import folder, stop_tokens, watched_layers

#: The published sampling.
TEMPERATURE, TOP_P = 0.7, 0.9


class Engine(Protocol):
    """Who answers, by settings that may be others for other batches."""

    settings: Settings
    #: The model in this process, which reads what was answered.
    model: Any

    def stream(self, todo: Iterable[Sequence[Task]]) -> Iterator[Shard]:
        """The batches' shards, each when it is finished; `todo` is read no further ahead than the engine is wide."""


def run(
    engine: Engine,
    store: Store,
    todo: Sequence[Sequence[Task]],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Runs what the store does not have yet.

    Parameters
    ----------
    engine
        answers the batches.
    store
        where the shards go.
    todo
        the batches.
    progress
        called with the number of rollouts that each batch finished or had.
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
    """Who does the work: this process, or Ray's workers (``axiscap.calibrate.cluster``)."""

    def rollouts(self, store: Store, todo: Sequence[Sequence[Task]], progress: Callable[[int], None]) -> None:
        """Has the batches answered that the store does not have."""

    def over_shards(self, work: Callable[[Store, Sequence[Sequence[Task]]], Any], store: Store, todo: Any) -> list[Any]:
        """`work` on parts of `todo`, whose results are to be merged."""

    def over_texts(
        self,
        work: Collect,
        store: Store,
        parts: Sequence[Sequence[Text]],
        progress: Callable[[int], None],
    ) -> Iterator[Any]:
        """`work` of the model and each part, in the order of the parts."""


class Here:
    """This process, with an engine."""

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
    """Answers by a transformers model, which reads what it answered.

    On GPUs, vLLM and the model that reads share each one's memory half and half.

    Parameters
    ----------
    model
        a causal LM.
    tokenizer
        its tokenizer, padding on the left. Without a chat template the model is taken for a base model: it
        continues ``Question: ... Answer:``, and its answer ends with the line, behind which the next question is.
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
        """Batch after batch; see :class:`Engine`."""
        for tasks in todo:
            shard = self.answer(tasks)
            means = read_means(self.model, shard.prompts, shard.answers, self.settings.norm_limits)
            yield dataclasses.replace(shard, means=means)

    @torch.inference_mode()
    def answer(self, tasks: Sequence[Task]) -> Shard:
        """Answers one batch, and does not read the answers: the shard's means are empty."""
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
        """Generated tokens up to their end-of-sequence; one that ends at once is its end-of-sequence."""
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[:end] or tokens[:1]

    def texts(self, answers: list[list[int]]) -> list[str]:
        """What the answers say."""
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


class EndpointEngine:
    """Answers by an OpenAI-compatible endpoint (vLLM's server, for one); the model here only reads them.

    Parameters
    ----------
    model
        the causal LM behind the endpoint, for the activations: a second pass over the finished texts.
    tokenizer
        its tokenizer.
    settings
        of the answers.
    base_url
        such as ``http://127.0.0.1:8000/v1``; ``OPENAI_BASE_URL`` without it.
    name
        the model's name there; the first that it lists without it.

    Raises
    ------
    ValueError
        no address.
    ConnectionError
        it does not answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, base_url: str | None = None, name: str | None = None
    ) -> None:
        self.settings, self.model = settings, model
        self.reader = TransformersEngine(model, tokenizer, settings)
        self.endpoint = Endpoint(base_url)
        self.name = name or self.endpoint.first_model()

    def stream(self, todo: Iterable[Sequence[Task]]) -> Iterator[Shard]:
        """Batches in their order, the next ones being asked while one is read; see :class:`Engine`."""
        with ThreadPoolExecutor(CONCURRENT) as pool:
            asked = ([(task, pool.submit(self._ask, task)) for task in batch] for batch in todo)
            waiting = deque(islice(asked, 2))
            while waiting:
                done = [(task, answer.result()) for task, answer in waiting.popleft()]
                waiting.extend(islice(asked, 1))
                yield self._read(done)

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

    def _read(self, done: Sequence[tuple[Task, str]]) -> Shard:
        tasks, texts = [task for task, _ in done], [text for _, text in done]
        answers = [self.reader.tokenizer(text or "\n", add_special_tokens=False)["input_ids"] for text in texts]
        prompts = self.reader.prompts(tasks)
        means = read_means(self.model, prompts, answers, self.settings.norm_limits)
        return Shard(tasks, prompts, answers, texts, means)


class VllmEngine:
    """Answers by vLLM in this process, continuously batched; the model here reads them (the extra ``axiscap[vllm]``).

    Parameters
    ----------
    model
        the causal LM, for the activations: a second pass over the finished answers.
    tokenizer
        its tokenizer.
    settings
        of the answers.
    """

    WIDE = 512  # requests under way

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
        """Batches when they finish, in whatever order; see :class:`Engine`."""
        todo, count = iter(todo), 0
        batches: dict[int, tuple[Sequence[Task], list[list[int]], dict[int, list[int]]]] = {}
        more = True
        while more or batches:
            while more and self.engine.get_num_unfinished_requests() < self.WIDE:
                batch = next(todo, None)
                more = batch is not None
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
    """The mean block outputs over each answer's tokens, (N, n_layers, H) float32, from finished texts.

    Attention sinks, beyond their layer's limit, are left out; where all rows of an answer are sinks, all count.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    place = torch.arange(longest, device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    begins = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    first = min(map(len, prompts))  # where an answer may begin
    of_answer = ((place >= begins) & (place < lengths))[:, first:]
    means: list[Tensor] = []

    def read(layer: int, hidden: Tensor) -> None:
        hidden, whole = hidden[:, first:], of_answer.to(hidden.device)
        ordinary = whole & are_ordinary(hidden, layer, norm_limits)
        counted = torch.where(ordinary.any(-1, keepdim=True), ordinary, whole)
        weights = counted.double() / counted.sum(-1, keepdim=True)
        means.append(torch.einsum("nt,nth->nh", weights, hidden.double()).float().cpu())

    with watched_layers(model, read):
        # Padding behind a text is not looked at by what stands before it.
        model(input_ids=ids, attention_mask=(place < lengths).long(), use_cache=False, logits_to_keep=1)
    return torch.stack(means, dim=1)


def _unpadded(inputs: Any) -> list[list[int]]:
    both = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in both]


def _accepts_system_role(tokenizer: Any) -> bool:
    try:
        tokenizer.apply_chat_template(Task("", 0, 0, "s", "q").messages(True), tokenize=False)
    except Exception:  # the template's own error; which class it is depends on the template
        return False
    return True


class _Sampler:
    """A logits processor that samples (temperature 0.7, top-p 0.9) by random numbers of each rollout's own.

    It leaves one token possible. A row's choice hangs on its logits and on its rollout's numbers alone: not on the rows
    beside it, as that of a generator shared by the batch would.
    """

    LIKELY = 256  # tokens among which a nucleus is looked for first: sorting all of a vocabulary costs more

    def __init__(self, ids: Sequence[str], settings: Settings) -> None:
        self.numbers = torch.from_numpy(np.stack([settings.numbers(id, settings.max_new_tokens) for id in ids]))
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float() / TEMPERATURE, dim=-1)
        numbers = self.numbers[:, self.step, None].to(scores.device)
        self.step += 1
        chosen = self._choose(probabilities, numbers, self.LIKELY)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def _choose(self, probabilities: Tensor, numbers: Tensor, likely: int) -> Tensor:
        """A token of each row's nucleus (N, 1): the fewest most likely tokens that have TOP_P together."""
        top, tokens = probabilities.topk(min(likely, probabilities.shape[-1]))
        sums = top.double().cumsum(-1)
        last = (sums < TOP_P).sum(-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
        wanted = numbers * sums.gather(-1, last)
        chosen = tokens.gather(-1, torch.minimum((sums <= wanted).sum(-1, keepdim=True), last))
        # Row by row, since how equals are ordered depends on how many are looked at.
        wide = sums[:, -1] < TOP_P
        if likely < probabilities.shape[-1] and bool(wide.any()):
            chosen[wide] = self._choose(probabilities[wide], numbers[wide], likely * 16)
        return chosen
