"""Tiny models of many architectures, served under a cap by a real engine, against the capped transformers model.

`make served-architectures` runs both engines and writes docs/served-architectures.md. Names of classes as arguments
run those alone, in place of what an earlier run found of them. Each model runs in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from architectures import SIZES, tiny
from conftest import REPOSITORY, free_port, unit
from torch import nn

import axiscap
from axiscap import CapProfile

DOCUMENT = REPOSITORY / "docs" / "served-architectures.md"
FOUND = REPOSITORY / "out" / "served"
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
#: Sizes that a class needs besides.
SIZES_OF = {
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "FalconForCausalLM": {"ffn_hidden_size": 512},
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Llama4ForCausalLM": {"num_experts_per_tok": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 32, "n_groups": 1, "state_size": 16},
    "NemotronForCausalLM": {"head_dim": 32, "num_key_value_heads": 2},
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
    for size, value in SIZES_OF.get(name, {}).items():
        setattr(config, size, value)
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
    """The log-probabilities of each prompt's tokens but the first, by the transformers model."""
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

    effect, off, uncapped = distance(capped, plain), distance(served.capped, capped), distance(served.plain, plain)
    if effect < 0.01:
        return Finding("not run", f"the cap changes the transformers model by {effect:.2g} nats only")
    if uncapped > 0.02 * effect:
        return Finding("not run", f"uncapped, the engine's model is {uncapped:.2g} nats from the one of transformers")
    if off <= max(1e-3, 4 * uncapped):
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
    if sentences := re.findall(r"axiscap: ([^\n]*)", said):
        return Finding("refused", " ".join(sentences[-1].split())[:200])
    errors = re.findall(r"^(?:\S+ )*(\w*(?:Error|Exception): [^\n]*)$", said, re.M)
    return Finding("not run", " ".join(errors[0].split())[:160] if errors else f"ended with {done.returncode}")


def survey(engine: str, names: Iterable[str]) -> dict[str, Finding]:
    found = {}
    for name in names:
        found[name] = look_at(engine, name, "eager")
        print(f"{engine} {name}: {found[name].outcome}: {found[name].why}", flush=True)
    return found


def page() -> str:
    """The page of the documentation, from what was found in each engine."""
    found = {engine: json.loads((FOUND / f"{engine}.json").read_text()) for engine in ENGINES}
    heads = [f"{ENGINES[engine]} {found[engine]['version']}" for engine in ENGINES]
    lines = [
        "# Served architectures",
        "",
        "Tiny random models, each made from a configuration of transformers, and served by real engines on a CPU,",
        "eagerly and in float32. *Right*: under a cap at three layers, the log-probabilities of three prompts are",
        "those of the capped transformers model, within the engine's own distance to the uncapped one. *Refused*: the",
        "server does not start, with AxisCap's reason. *Not run*: the engine or transformers cannot run the model.",
        "`make served-architectures` writes this page, in an hour.",
        "",
        f"| class | {' | '.join(heads)} |",
        "|---|---|---|",
    ]
    for name in ARCHITECTURES:
        cells = []
        for engine in ENGINES:
            outcome, why = found[engine]["findings"][name]
            said = f"{outcome}: {why}" if outcome != "right" else outcome
            cells.append(said.replace("|", chr(92) + "|"))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


#: One model of each kind of output, and one whose blocks keep a state; mode.
KINDS = {
    "vllm": (
        ("CohereForCausalLM", "compiled"),
        ("GPTNeoXForCausalLM", "compiled"),
        ("OPTForCausalLM", "eager"),
        ("FalconH1ForCausalLM", "eager"),
    ),
    "sglang": (("CohereForCausalLM", "eager"), ("StableLmForCausalLM", "eager"), ("LlamaForCausalLM", "eager")),
}
ENGINE = "sglang" if "sglang" in sys.prefix else "vllm"


@pytest.mark.parametrize(("name", "mode"), KINDS[ENGINE])
def test_one_model_of_each_kind_is_capped_right(name, mode):
    assert look_at(ENGINE, name, mode).outcome == "right"


def main(names: list[str]) -> None:
    found, file = survey(ENGINE, names or ARCHITECTURES), FOUND / f"{ENGINE}.json"
    findings = {name: (finding.outcome, finding.why) for name, finding in found.items()}
    if not names or file.exists():
        earlier = json.loads(file.read_text())["findings"] if names else {}
        version = importlib.metadata.version({"vllm": "vllm-cpu"}.get(ENGINE, ENGINE))
        FOUND.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"version": version, "findings": earlier | findings}))
    if all((FOUND / f"{engine}.json").exists() for engine in ENGINES):
        DOCUMENT.write_text(page())
    sys.exit(any(finding.outcome in ("wrong", "uncapped") for finding in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        main_child(*sys.argv[2:])
    else:
        main(sys.argv[1:])
