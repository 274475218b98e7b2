"""Every way to generate, with a model of every kind: the texts under an installation against those under hooks in
plain torch.

``python tests/generation.py > docs/generation.md`` writes the table; ``make nightly`` holds it against what is found.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import LAYERS, SIZES, build, quietly, sentence
from conftest import unit
from tiny_models import plain_cap, tokens
from torch import nn

import axiscap
from axiscap import CapProfile, models

DOCUMENT = Path(__file__).parents[1] / "docs" / "generation.md"
#: By what tells them apart: positions, cache, experts, a state in the place of a cache, both, images beside the text.
FAMILIES = {
    "rotary positions": "LlamaForCausalLM",
    "learned positions": "GPT2LMHeadModel",
    "ALiBi": "BloomForCausalLM",
    "sliding windows": "Gemma3ForCausalLM",
    "experts": "MixtralForCausalLM",
    "a decoder alone": "BartForCausalLM",
    "state space": "MambaForCausalLM",
    "recurrence and attention": "RecurrentGemmaForCausalLM",
    "state space and attention": "JambaForCausalLM",
    "linear attention": "Qwen3NextForCausalLM",
    "image and text": "Gemma3ForConditionalGeneration",
}
POSITIONS = ("all", "generated")
BATCH, PROMPT, NEW = 2, 9, 12
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "disable_compile": True}
SAMPLED = GREEDY | {"do_sample": True}
#: By way: what generate() is told, and where the texts must be those of another way, what that is told.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "greedy": (GREEDY, None),
    "sampling": (SAMPLED, None),
    "several answers": (SAMPLED | {"num_return_sequences": 2}, None),
    "beams": (GREEDY | {"num_beams": 3}, None),
    "no cache": (GREEDY | {"use_cache": False}, None),
    "static cache": (GREEDY | {"cache_implementation": "static"}, None),
    "padding on the left": (GREEDY | {"padded": True}, None),
    "embeddings": (GREEDY | {"embedded": True}, None),
    "a prompt in chunks": (GREEDY | {"prefill_chunk_size": 4}, GREEDY),
    "prompt lookup": (GREEDY | {"prompt_lookup_num_tokens": 3, "one": True}, GREEDY | {"one": True}),
    "a model that drafts": (GREEDY | {"drafted": True, "one": True}, GREEDY | {"one": True}),
    "continuous batching": (GREEDY | {"batched": True}, GREEDY),
}
#: The lowest is taken at which the cap changes what is written.
FLOORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def prompts(way: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that repeat themselves, so that there is something to look up, and their mask."""
    ids = tokens(1 if way.get("one") else BATCH, PROMPT // 3).repeat(1, 3)
    mask = torch.ones_like(ids)
    if way.get("padded"):
        mask[1, :3] = 0
        ids[mask == 0] = 0
    return ids, mask


@torch.no_grad()
def written(model: Any, way: dict[str, Any], draft: nn.Module) -> list[list[int]]:
    """What a model writes in a way."""
    ids, mask = prompts(way)
    options = {name: value for name, value in way.items() if name not in {"one", "padded"}}
    torch.manual_seed(3)
    if options.pop("batched", False):
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
        blocks = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, allow_block_sharing=False)
        result = model.generate_batch(ids.tolist(), config, blocks, warmup=False)
        return [result[key].generated_tokens for key in sorted(result)]
    if options.pop("drafted", False):
        options["assistant_model"] = draft
    if options.pop("embedded", False):
        embeds = model.get_input_embeddings()(ids)
        return model.generate(inputs_embeds=embeds, attention_mask=mask, **options).tolist()
    return model.generate(ids, attention_mask=mask, **options)[:, PROMPT:].tolist()


def try_method(model: nn.Module, draft: nn.Module, way: str, positions: str) -> str:
    """Right, refused and with which sentence, wrong, or that transformers cannot do it."""
    told, like = WAYS[way]
    like = like or told
    mask = prompts(like)[1]
    size = models.text_config(model).hidden_size
    try:
        with quietly():
            plain = written(model, told, draft)
        if {len(answer) for answer in plain} != {NEW}:
            raise ValueError("no answers, and no error")
    except Exception as error:
        return f"transformers cannot: {sentence(error).split(', such as')[0]}"
    for floor in FLOORS:
        profile = CapProfile(LAYERS, unit(len(LAYERS), 1, size, seed=1), torch.full((len(LAYERS), 1), floor))
        with quietly(), plain_cap(model, profile, mask if positions == "all" else torch.zeros_like(mask)):
            expected = written(model, like, draft)
        if expected != plain:
            break
    else:
        return "wrong: no floor changes what is written"
    try:
        with quietly(), axiscap.install(model, profile, positions=positions):
            result = written(model, told, draft)
    except (ValueError, RuntimeError) as error:
        return f"refused: {sentence(error)}"
    return "right" if result == expected else f"wrong: {result} where {expected} was expected"


def survey() -> dict[tuple[str, str, str], str]:
    """By family, way and positions."""
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    result = {}
    for family, name in FAMILIES.items():
        with quietly():
            model, draft = build(name, SIZES), build(name, SIZES)
            with torch.no_grad():
                for parameter in models.decoder_layers(draft)[-1].parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for way in WAYS:
            for positions in POSITIONS:
                result[family, way, positions] = try_method(model, draft, way, positions)
                print(family, way, positions, result[family, way, positions], sep=": ", file=sys.stderr, flush=True)
    return result


def table(result: dict[tuple[str, str, str], str]) -> str:
    """The page of the documentation."""
    notes: list[str] = []

    def cell(family: str, way: str) -> str:
        said = list(dict.fromkeys(result[family, way, positions] for positions in POSITIONS))
        if said == ["right"]:
            return "right"
        for outcome in said:
            if outcome not in notes:
                notes.append(outcome)
        return " ".join(f"{outcome.split(':')[0]} ({notes.index(outcome) + 1})" for outcome in said)

    rows = [f"| {way} | {' | '.join(cell(family, way) for family in FAMILIES)} |" for way in WAYS]
    models_of = ", ".join(f"{family}: `{name}`" for family, name in FAMILIES.items())
    lines = [
        "# Generation methods",
        "",
        "Tiny models of every kind, under `axiscap.install`, with every generation method of transformers",
        f"{transformers.__version__}, compared with hooks in plain torch. *Right*: the same",
        'tokens, with `positions="all"` and with `positions="generated"`, at a floor that changes them.',
        "`python tests/generation.py > docs/generation.md` makes this page.",
        "",
        f"The models are {models_of}.",
        "",
        f"| | {' | '.join(FAMILIES)} |",
        f"|---|{'---|' * len(FAMILIES)}",
        *rows,
        "",
        *[f"{number}. {note.replace('|', chr(92) + '|')}" for number, note in enumerate(notes, 1)],
    ]
    return "\n".join(lines) + "\n"


def test_no_generation_method_is_wrong() -> None:
    """And the page says what is found."""
    result = survey()
    assert {cell: said for cell, said in result.items() if said.startswith("wrong")} == {}
    assert sum(said == "right" for said in result.values()) > 200
    assert DOCUMENT.read_text() == table(result)


if __name__ == "__main__":
    sys.stdout.write(table(survey()))
