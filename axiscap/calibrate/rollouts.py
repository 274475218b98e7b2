"""Rollouts: a model answers questions under system prompts, and each answer becomes one vector a layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from axiscap.models import decoder_layers


@dataclass(frozen=True)
class Prompt:
    """One question under one system prompt (empty: none)."""

    system: str
    question: str

    def messages(self, system_role: bool) -> list[dict[str, str]]:
        if not self.system:
            return [{"role": "user", "content": self.question}]
        if system_role:
            return [{"role": "system", "content": self.system}, {"role": "user", "content": self.question}]
        return [{"role": "user", "content": f"{self.system}\n\n{self.question}"}]


@dataclass
class Rollouts:
    """The answers (N) and their mean activations (N, n_layers, H), float32."""

    answers: list[str]
    activations: Tensor


def run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    seed: int = 0,
    work: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Rollouts:
    """Answers every prompt (temperature 0.7, top-p 0.9) and averages the block outputs over each answer's tokens.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer, padding on the left, with a chat template.
        prompts: N of them.
        max_new_tokens: an answer's length at most.
        batch_size: prompts generated at once.
        seed: of the sampling; a batch's answers depend on it and on the batch alone.
        work: a folder for finished batches: a run that was stopped takes up where it was.
        progress: called with the number of prompts that each batch finished.
    """
    settings = json.dumps([max_new_tokens, seed, getattr(model.config, "name_or_path", ""), str(model.dtype)])
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        key = hashlib.sha256((settings + repr((start, batch))).encode()).hexdigest()[:24]
        path = work / f"{key}.safetensors" if work else None
        part = _read(path) if path else None
        if part is None:
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seed + start)
                part = _run_batch(model, tokenizer, batch, max_new_tokens)
            if path:
                _write(path, part)
        parts.append(part)
        progress(len(batch))
    return Rollouts([a for part in parts for a in part.answers], torch.cat([part.activations for part in parts]))


def _read(path: Path) -> Rollouts | None:
    try:
        with safe_open(path, framework="pt") as file:
            return Rollouts(json.loads(file.metadata()["answers"]), file.get_tensor("activations"))
    except (FileNotFoundError, SafetensorError):
        return None


def _write(path: Path, part: Rollouts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"activations": part.activations}, partial, {"answers": json.dumps(part.answers)})
    os.replace(partial, path)


def _accepts_system_role(tokenizer: Any) -> bool:
    try:
        tokenizer.apply_chat_template(Prompt("s", "q").messages(True), tokenize=False)
    except Exception:  # the template's own error; which class it is depends on the template
        return False
    return True


@torch.inference_mode()
def _run_batch(model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> Rollouts:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; calibration needs an instruction-tuned model")
    system_role = _accepts_system_role(tokenizer)
    inputs = tokenizer.apply_chat_template(
        [prompt.messages(system_role) for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    with _AnswerMeans(model) as means:
        # One more than wanted: a token's activations come about when it is fed back, so the last one has none.
        tokens = model.generate(
            **inputs, **sampling, max_new_tokens=max_new_tokens + 1, pad_token_id=tokenizer.pad_token_id
        )
    answers = tokens[:, inputs["input_ids"].shape[1] :][:, :max_new_tokens]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Rollouts([text.strip() for text in texts], means.result())


class _AnswerMeans:
    """Averages the block outputs over each answer's tokens while ``generate`` makes them, up to the end-of-sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model
        stops = model.generation_config.eos_token_id
        self.stops = torch.tensor(stops if isinstance(stops, list) else [stops], device=model.device)
        self.layers = decoder_layers(model)
        self.running: Tensor | None = None  # (N,) whether the token being fed still belongs to the answer
        self.ended: Tensor | None = None  # (N,) whether its end-of-sequence has been fed
        self.count: Tensor | None = None  # (N,) answer tokens so far
        self.sums: list[Tensor | None] = [None] * len(self.layers)  # (N, H) float64 each

    def __enter__(self) -> _AnswerMeans:
        self.handles = [self.model.get_input_embeddings().register_forward_pre_hook(self._before)]
        self.handles += [
            layer.register_forward_hook(partial(self._collect, index)) for index, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        ids = args[0]
        if self.count is None or self.ended is None:  # the prompt
            self.count = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            self.ended = self.count > 0
            return
        self.ended = self.ended | torch.isin(ids[:, -1], self.stops)
        # An answer that ends at once would have no activations: its end-of-sequence stands for it.
        self.running = ~self.ended | (self.count == 0)
        self.count = self.count + self.running

    def _collect(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if self.running is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        last = hidden[:, -1].double() * self.running.to(hidden.device)[:, None]
        known = self.sums[index]
        self.sums[index] = last if known is None else known + last

    def result(self) -> Tensor:
        """(N, n_layers, H) float32."""
        if self.count is None or self.running is None:
            raise ValueError("the model ended all answers of a batch before their first token")
        sums = [total.cpu() for total in self.sums if total is not None]
        return (torch.stack(sums, dim=1) / self.count.cpu()[:, None, None]).float()
