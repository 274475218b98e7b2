"""Every generation method, with a model of every kind: the tokens under an installation against those under hooks in
plain torch.

``python tests/generation.py > docs/generation.md`` writes the page; ``make nightly`` compares it with new results.
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
EOS = 2
#: The end of the page; tests/test_generate_rows.py has the tests.
OWNERS = """
## Whose rows they are

| rows | |
|---|---|
| padding, on either side | nobody's: neither capped nor measured |
| behind the end of an answer, while others of the batch go on | nobody's, as padding: behind an end-of-sequence token, a stop string or a stopping criterion of yours |
| the virtual tokens of prompt tuning | the prompt's |
| drafted tokens, by prompt lookup, an assistant or the model itself | written ones, also if the model rejects them |
| an assistant model's own | the assistant's, which is not capped |
| the unconditional pass of classifier-free guidance | its prompt is a prompt, and the answer's tokens in it are written ones |
| beams | every running beam's, also of one that is dropped later |
| an inner decoder's, such as the depth decoder of a speech model | not capped: its layers are other ones |
| a pass outside `generate()` | with `positions="generated"`, one token behind a cache or a state is a written one, and all else a prompt; a warning says so |
"""  # noqa: E501
BATCH, PROMPT, NEW = 2, 9, 12
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "disable_compile": True}
SAMPLED = GREEDY | {"do_sample": True}
#: By method: the options of generate(), and those of another method if the tokens must be the same.
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
    "guidance": (GREEDY | {"guidance_scale": 1.5}, None),
    "an answer that ends first": (GREEDY | {"ended": True, "min_new_tokens": None}, None),
    "continuous batching": (GREEDY | {"batched": True}, GREEDY),
}
#: Of these the lowest at which the cap changes the tokens.
FLOORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def prompts(way: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that repeat themselves, for prompt lookup, and their mask."""
    ids = tokens(1 if way.get("one") else BATCH, PROMPT // 3).repeat(1, 3)
    mask = torch.ones_like(ids)
    if way.get("padded"):
        mask[1, :3] = 0
        ids[mask == 0] = 0
    return ids, mask


@torch.no_grad()
def written(model: Any, way: dict[str, Any], draft: nn.Module) -> list[list[int]]:
    """The tokens that a model writes by a method."""
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
    if options.pop("ended", False):
        options["logits_processor"] = [end_first]
    if "guidance_scale" in options:
        options["negative_prompt_ids"] = ids.flip(1)
    if options.pop("embedded", False):
        embeds = model.get_input_embeddings()(ids)
        return model.generate(inputs_embeds=embeds, attention_mask=mask, **options).tolist()
    return model.generate(ids, attention_mask=mask, **options)[:, PROMPT:].tolist()


def end_first(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Ends the first answer at its fourth token, and no other."""
    scores[:, EOS] = -torch.inf
    if ids.shape[1] % PROMPT == 3:
        scores[0, EOS] = torch.finfo(scores.dtype).max
    return scores


def try_method(model: nn.Module, draft: nn.Module, way: str, positions: str) -> str:
    """The outcome of one method: right, refused, wrong, or that transformers cannot do it, with the reason."""
    options, same_as = WAYS[way]
    same_as = same_as or options
    mask = prompts(same_as)[1]
    size = models.text_config(model).hidden_size
    try:
        with quietly():
            plain = written(model, options, draft)
        if {len(answer) for answer in plain} != {NEW}:
            raise ValueError("no answers, and no error")
    except Exception as error:
        return f"transformers cannot: {sentence(error).split(', such as')[0]}"
    for floor in FLOORS:
        profile = CapProfile(LAYERS, unit(len(LAYERS), 1, size, seed=1), torch.full((len(LAYERS), 1), floor))
        with quietly(), plain_cap(model, profile, mask if positions == "all" else torch.zeros_like(mask)):
            expected = written(model, same_as, draft)
        if expected != plain:
            break
    else:
        return "wrong: no floor changes the tokens"
    try:
        with quietly(), axiscap.install(model, profile, positions=positions):
            result = written(model, options, draft)
    except (ValueError, RuntimeError) as error:
        return f"refused: {sentence(error)}"
    return "right" if result == expected else f"wrong: {result} where {expected} was expected"


def survey() -> dict[tuple[str, str, str], str]:
    """The outcomes by family, method and positions."""
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
        outcomes = list(dict.fromkeys(result[family, way, positions] for positions in POSITIONS))
        if outcomes == ["right"]:
            return "right"
        for outcome in outcomes:
            if outcome not in notes:
                notes.append(outcome)
        return " ".join(f"{outcome.split(':')[0]} ({notes.index(outcome) + 1})" for outcome in outcomes)

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
    return "\n".join(lines) + "\n" + OWNERS


def test_no_generation_method_is_wrong() -> None:
    """The page has these results."""
    result = survey()
    assert {cell: outcome for cell, outcome in result.items() if outcome.startswith("wrong")} == {}
    assert sum(outcome == "right" for outcome in result.values()) > 200
    assert DOCUMENT.read_text() == table(result)


if __name__ == "__main__":
    sys.stdout.write(table(survey()))
