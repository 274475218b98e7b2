"""Tiny models of many architectures, served under a cap by a real engine, against the capped transformers model.

`make served-architectures` runs both engines and writes docs/served-architectures.md. Names of classes as arguments
run those alone and write nothing. Each model runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import SIZES, tiny
from conftest import REPOSITORY, free_port, unit
from torch import nn

import axiscap
from axiscap import CapProfile

DOCUMENT = REPOSITORY / "docs" / "served-architectures.md"
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}
#: Sizes that the engines' CPU kernels take.
SERVED_SIZES = SIZES | {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 256),
    **dict.fromkeys(("head_dim", "rotary_dim", "v_head_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    "mamba_d_head": 64,
    "mamba_n_heads": 4,
    "mamba_d_ssm": 256,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "sliding_window": 64,
}
#: What else must fit together.
SIZES_OF = {
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 32, "n_groups": 1, "state_size": 16},
    "Llama4ForCausalLM": {"num_experts_per_tok": 1},
}
LAYERS = (1, 2, 3)
PROMPTS = ([5, 17, 3, 99, 42, 8, 64], [200, 11], [7] * 5 + [91, 33, 120])
ARCHITECTURES = (
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "Dots1ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Exaone4ForCausalLM",
    "FalconForCausalLM",
    "FalconH1ForCausalLM",
    "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "HeliumForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "LlamaForCausalLM",
    "Llama4ForCausalLM",
    "Mamba2ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "NemotronForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoeForCausalLM",
    "PhiForCausalLM",
    "Phi3ForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "StableLmForCausalLM",
    "Starcoder2ForCausalLM",
)


@dataclass(frozen=True)
class Finding:
    """``outcome``: right, refused, not run, uncapped or wrong; ``why``: the sentence."""

    outcome: str
    why: str = ""


def make(name: str, folder: Path) -> tuple[nn.Module, CapProfile]:
    """Saves a tiny model of a class of transformers, and a profile that changes it."""
    import transformers

    kind = getattr(transformers, name)
    config = tiny(kind.config_class, SERVED_SIZES | SIZES_OF.get(name, {}))
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = kind._from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv" not in parameter_name and "A_log" not in parameter_name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "model")
    facts = {"architecture": name, "num_layers": 4, "hidden_size": model.get_input_embeddings().weight.shape[-1]}
    axes = unit(len(LAYERS), 1, facts["hidden_size"], seed=1)
    profile = CapProfile(LAYERS, axes, torch.full((len(LAYERS), 1), 1.0), {"model": facts})
    profile.save(folder / "profile.safetensors")
    return model, profile


def log_probabilities(model: nn.Module, profile: CapProfile | None) -> list[float]:
    """Of each prompt's tokens but the first, by the transformers model."""
    found = []
    for ids in PROMPTS:
        with torch.no_grad():
            if profile is None:
                logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            else:
                with axiscap.install(model, profile):
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        scores = logits.log_softmax(-1)
        found += [scores[at, token].item() for at, token in enumerate(ids[1:])]
    return found


@dataclass(frozen=True)
class Served:
    """The log-probabilities that an engine gives, under the cap and without."""

    capped: list[float]
    plain: list[float]


def configuration(folder: Path) -> dict[str, object]:
    return {"profiles": {"p": str(folder / "profile.safetensors")}, "allow_off": True}


def served_by_vllm(folder: Path, *, eager: bool) -> Served:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "model"), dtype="float32", max_model_len=64, enforce_eager=eager, skip_tokenizer_init=True,
        max_num_seqs=4, enable_prefix_caching=False, distributed_executor_backend="uni",
        additional_config={"axiscap": configuration(folder)},
    )  # fmt: skip

    def scores(extra: dict[str, str] | None) -> list[float]:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False, extra_args=extra)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
        return [
            output.prompt_logprobs[at + 1][token].logprob
            for ids, output in zip(PROMPTS, outputs, strict=True)
            for at, token in enumerate(ids[1:])
        ]

    found = Served(scores(None), scores({"axiscap": "off"}))
    llm.llm_engine.engine_core.shutdown()
    return found


def served_by_sglang(folder: Path, *, eager: bool) -> Served:
    from sglang import Engine

    (folder / "config.json").write_text(json.dumps(configuration(folder)))
    os.environ["AXISCAP_CONFIG"] = str(folder / "config.json")
    engine = Engine(
        model_path=str(folder / "model"), dtype="float32", device="cpu", attention_backend="torch_native",
        sampling_backend="pytorch", disable_cuda_graph=True, context_length=64, max_total_tokens=256,
        skip_tokenizer_init=True, log_level="error", disable_radix_cache=True, port=free_port(),
    )  # fmt: skip

    def scores(extra: dict[str, object]) -> list[float]:
        outputs = engine.generate(
            input_ids=[list(ids) for ids in PROMPTS],
            sampling_params={"max_new_tokens": 1, "temperature": 0, **extra},
            return_logprob=True,
            logprob_start_len=0,
        )
        return [score for output in outputs for score, *_ in output["meta_info"]["input_token_logprobs"][1:]]

    found = Served(scores({}), scores({"custom_params": {"axiscap": "off"}}))
    engine.shutdown()
    return found


SERVED = {"vllm": served_by_vllm, "sglang": served_by_sglang}


def compare(served: Served, capped: Sequence[float], plain: Sequence[float]) -> Finding:
    """The engine's log-probabilities against those of transformers, in nats."""

    def distance(one: Sequence[float], other: Sequence[float]) -> float:
        return max(abs(a - b) for a, b in zip(one, other, strict=True))

    effect, off = distance(capped, plain), distance(served.capped, capped)
    if effect < 0.01:
        return Finding("not run", f"the cap changes the transformers model by {effect:.2g} nats only")
    if distance(served.plain, plain) > 1e-3:
        return Finding("not run", f"uncapped, the engine's model differs by {distance(served.plain, plain):.2g} nats")
    if off <= 1e-3 * max(1.0, effect):
        return Finding("right", f"within {off:.1g} of {effect:.2g} nats")
    outcome = "uncapped" if distance(served.capped, plain) < 1e-3 else "wrong"
    return Finding(outcome, f"{off:.2g} nats from the capped model, whose cap has an effect of {effect:.2g}")


def main_child(engine: str, name: str, mode: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, profile = make(name, folder)
        capped, plain = log_probabilities(model, profile), log_probabilities(model, None)
        served = SERVED[engine](folder, eager=mode == "eager")
        finding = compare(served, capped, plain)
        print(f"FINDING {json.dumps([finding.outcome, finding.why])}", flush=True)
        os._exit(0)


def look_at(engine: str, name: str, mode: str) -> Finding:
    """One architecture, in a process of its own. Of a refusal it gives the last sentence of AxisCap's in the log."""
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "SGLANG_USE_CPU_ENGINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_DISABLE_COMPILE_CACHE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", engine, name, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    said = done.stdout + done.stderr
    if (found := re.search(r"^FINDING (.*)$", said, re.M)) is not None:
        return Finding(*json.loads(found[1]))
    if (folder := os.environ.get("SERVED_LOGS")) is not None:
        (Path(folder) / f"{engine}-{name}-{mode}.log").write_text(said)
    if sentences := re.findall(r"axiscap: ([^\n]*)", said):
        return Finding("refused", " ".join(sentences[-1].split())[:200])
    errors = re.findall(r"^(?:\S+ )*(\w*(?:Error|Exception): [^\n]*)$", said, re.M)
    return Finding("not run", " ".join(errors[0].split())[:160] if errors else f"ended with {done.returncode}")


def main(arguments: Iterable[str]) -> None:
    engine = "sglang" if "sglang" in sys.prefix else "vllm"
    for name in arguments or ARCHITECTURES:
        for mode in ("eager",):
            found = look_at(engine, name, mode)
            print(f"{engine} {name} {mode}: {found.outcome}: {found.why}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        main_child(*sys.argv[2:])
    else:
        main(sys.argv[1:])
