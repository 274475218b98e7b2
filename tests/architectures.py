"""Every architecture of transformers' causal and image-text mappings that a tiny configuration can build, under a cap.

``python tests/architectures.py > docs/architectures.md`` writes the table; ``make nightly`` holds it against what is
found.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import unit
from tiny_models import plain_cap, tokens
from torch import nn
from transformers.models.auto import modeling_auto

import axiscap
from axiscap import CapProfile, models

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
#: What configurations call their sizes, and how small they are made.
SIZES = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dim_ff", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "dim_head"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "context_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 97),
    **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"), 0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 90,
    "image_token_index": 90,
    "video_token_id": 91,
    "video_token_index": 91,
    "audio_token_id": 92,
    "image_size": 8,
    "patch_size": 4,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "state_size": 4,
    "sliding_window": 16,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_kv_shared_layers": 0,
}
#: Where those do not fit together, heads of the usual width.
WIDE = SIZES | {"hidden_size": 512, "head_dim": 128, "num_experts_per_tok": 1, "hidden_size_per_layer_input": 0}
#: More parameters than this are no tiny model, whatever the configuration says.
MOST_PARAMETERS = 30_000_000
SECONDS = 60
LAYERS, FLOOR = [1, 2], 3.0
MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Finding:
    """``outcome``: right, refused, not built, or wrong; ``why``: the sentence."""

    architecture: str
    outcome: str
    why: str = ""


class _TooSlow(Exception):
    pass


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers says of tiny configurations, and for a minute at most."""

    def stop(*_: object) -> None:
        raise _TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tiny(kind: type, small: dict[str, int]) -> Any:
    """A configuration of a class with every size that is known made small, those within it as well."""
    made = kind()
    known = made.to_dict()
    sizes: dict[str, Any] = {name: size for name, size in small.items() if isinstance(known.get(name), int)}
    if "head_dim" in known:
        sizes["head_dim"] = small["head_dim"]
    for name, part in getattr(kind, "sub_configs", {}).items():
        inner = getattr(made, name, None)
        if inner is not None:
            within = tiny(type(inner), small)
            sizes[name] = within if part is transformers.AutoConfig else within.to_dict()
    if isinstance(known.get("layer_types"), list):
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = [kinds[at % len(kinds)] for at in range(4)]
    if "kv_lora_rank" in known and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for rope in ("rope_parameters", "rope_scaling"):
        if isinstance(known.get(rope), dict) and "mrope_section" in known[rope]:
            sizes[rope] = known[rope] | {"mrope_section": [2, 1, 1]}  # of the half of a head
    return kind(**sizes)


def build(name: str, small: dict[str, int]) -> nn.Module:
    """A tiny model of a class of transformers."""
    model_class = getattr(transformers, name)
    config = tiny(model_class.config_class, small)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(config).float().eval()
    return model


def look_at(name: str) -> Finding:
    """One architecture, in the first of the sizes that it can be built in."""
    first = _look_at(name, SIZES)
    second = _look_at(name, WIDE) if first.outcome == "not built" else first
    return first if second.outcome == "not built" else second


@torch.no_grad()
def _look_at(name: str, small: dict[str, int]) -> Finding:
    """The logits under an installation against those under hooks in plain torch."""
    ids = tokens(2, 9)
    try:
        with quietly():
            model = build(name, small)
            plain = model(input_ids=ids).logits
            if not bool(plain.isfinite().all()):
                raise ValueError("logits that are not finite")
    except (Exception, _TooSlow) as error:
        return Finding(name, "not built", sentence(error))
    try:
        with quietly():
            layers = LAYERS[: len(models.decoder_layers(model)) - 1]
            size = getattr(models.text_config(model), "hidden_size", model.get_input_embeddings().weight.shape[-1])
            floors = torch.full((len(layers), 1), FLOOR)
            profile = CapProfile(layers, unit(len(layers), 1, size, seed=1), floors)
            with axiscap.install(model, profile) as cap:
                result = model(input_ids=ids).logits
                counted = cap.stats()["default"][LAYERS[0]].rows
    except (ValueError, TypeError, RuntimeError) as error:
        return Finding(name, "refused", sentence(error))
    try:
        with quietly(), plain_cap(model, profile):
            expected = model(input_ids=ids).logits
    except Exception as error:
        return Finding(name, "not built", f"plain hooks fail: {sentence(error)}")
    scale = (expected - plain).abs().max()
    if (result - expected).abs().max() > 1e-3 * scale or scale == 0 or counted < ids.numel():
        return Finding(name, "wrong", f"off by {(result - expected).abs().max():.2g} of {scale:.2g}, {counted} rows")
    return Finding(name, "right")


def sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def survey() -> dict[str, list[Finding]]:
    """By mapping."""
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    result = {}
    for mapping, names in MAPPINGS.items():
        classes = sorted({name for entry in names.values() for name in ((entry,) if isinstance(entry, str) else entry)})
        result[mapping] = []
        for number, name in enumerate(classes):
            result[mapping].append(look_at(name))
            print(f"{mapping} {number + 1} of {len(classes)}: {result[mapping][-1]}", file=sys.stderr, flush=True)
    return result


def table(result: dict[str, list[Finding]]) -> str:
    """The page of the documentation."""
    lines = [
        "# Architectures",
        "",
        f"The models of transformers {transformers.__version__}, each built from a tiny configuration. For each, the",
        "logits under `axiscap.install` are compared with those under hooks in plain torch.",
        "`python tests/architectures.py > docs/architectures.md` makes this page.",
    ]
    for mapping, findings in result.items():
        of = {
            outcome: [f for f in findings if f.outcome == outcome]
            for outcome in ("right", "refused", "not built", "wrong")
        }
        counts = ", ".join(f"{len(those)} {outcome}" for outcome, those in of.items() if those)
        lines += [
            "",
            f"## {mapping}: {counts}",
            "",
            "Right: " + ", ".join(f"`{f.architecture}`" for f in of["right"]) + ".",
        ]
        for outcome in ("refused", "wrong", "not built"):
            if of[outcome]:
                lines += ["", f"| {outcome} | why |", "|---|---|"]
                lines += [f"| `{f.architecture}` | {f.why.replace('|', chr(92) + '|')} |" for f in of[outcome]]
    return "\n".join(lines) + "\n"


def test_no_architecture_is_wrong() -> None:
    """And the page says what is found."""
    result = survey()
    assert [f for findings in result.values() for f in findings if f.outcome == "wrong"] == []
    assert sum(f.outcome == "right" for findings in result.values() for f in findings) > 150
    assert DOCUMENT.read_text() == table(result)


if __name__ == "__main__":
    sys.stdout.write(table(survey()))
