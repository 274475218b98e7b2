"""Rollouts: a model answers questions under system prompts, and each answer becomes one vector a layer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    tokens = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    prompt_length = inputs["input_ids"].shape[1]
    answer = _answer_mask(tokens[:, prompt_length:], model, tokenizer)
    mask = torch.cat([inputs["attention_mask"], answer.long()], dim=1)
    activations = _mean_activations(model, tokens, mask, prompt_length, answer)
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return Rollouts([text.strip() for text in texts], activations)


def _answer_mask(answer: Tensor, model: Any, tokenizer: Any) -> Tensor:
    """True up to the token before the first end-of-sequence one, and for the first token in any case."""
    stop = model.generation_config.eos_token_id
    stops = torch.tensor(stop if isinstance(stop, list) else [stop], device=answer.device)
    ended = torch.isin(answer, stops).cumsum(1) > 0
    ended[:, 0] = False
    return ~ended


def _mean_activations(model: Any, tokens: Tensor, mask: Tensor, start: int, answer: Tensor) -> Tensor:
    """Block outputs averaged over the answer's tokens, by one forward pass over prompts and answers: (N, layers, H)."""
    layers = decoder_layers(model)
    weights = answer.double() / answer.sum(1, keepdim=True)
    means: list[Tensor] = []

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        means.append(torch.einsum("nth,nt->nh", hidden[:, start:].double(), weights.to(hidden.device)).float().cpu())

    handles = [layer.register_forward_hook(collect) for layer in layers]
    try:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(means, dim=1)
