"""Throughput and time per output token of a capped vLLM server over an uncapped one, by vLLM's own benchmark client.

Three servers run side by side: without AxisCap, with AxisCap, and with the published operations as forward hooks, for
which vLLM must run eagerly. Only one of them works at a time. Rounds go over the servers in turn; ratios are within one
round. The quick steps are the first quartile of the times between two tokens: other work on the machine makes steps
slower and never quicker, so that the quartile describes the server better than the mean.

Run it where vLLM is: ``PYTHONPATH=. python benchmarks/serving.py --rounds 5``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from axiscap import models

PROFILE = Path(__file__).parent.parent / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"
CONCURRENCIES = (1, 8, 32)
#: The dtype that a CPU without bfloat16 instructions computes quickly.
DTYPE = "float32"


@contextlib.contextmanager
def server(arguments: list[str], folder: Path, name: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        models.folder("smollm2-135m-instruct"),
    ]
    command += ["--served-model-name", "m", "--dtype", DTYPE, "--max-model-len", "1024", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--no-enable-prefix-caching", *arguments]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "AXISCAP_BENCHED": str(PROFILE),
    }
    with (folder / name).open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None:
                raise SystemExit((folder / name).read_text()[-3000:])
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def measure(url: str, concurrency: int) -> dict[str, float]:
    """One run of `vllm bench serve`, in this process: random prompts of 64 tokens, 32 tokens of answer."""
    # `vllm bench` demands a distribution named vllm, and the one for CPUs has another name.
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    options = ["--base-url", url, "--model", "m", "--tokenizer", models.folder("smollm2-135m-instruct")]
    options += ["--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "32", "--ignore-eos"]
    options += ["--num-prompts", str(max(4, 2 * concurrency)), "--max-concurrency", str(concurrency), "--disable-tqdm"]
    options += ["--percentile-metrics", "tpot,itl", "--metric-percentiles", "25"]
    with contextlib.redirect_stdout(io.StringIO()):
        return serve.main(parser.parse_args(options))


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    config = json.dumps({"axiscap": {"profiles": {"p": str(PROFILE)}}})
    servers = {
        "uncapped": [],
        "axiscap": ["--additional-config", config],
        "the published hook, eager": ["--enforce-eager", "--worker-cls", "benchmarks.hooked_worker.HookedWorker"],
    }
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {name: stack.enter_context(server(extra, folder, name)) for name, extra in servers.items()}
        for url in running.values():
            measure(url, 1)  # warm
        for number in track(range(rounds * len(CONCURRENCIES)), "rounds", console=Console(stderr=True)):
            concurrency = CONCURRENCIES[number % len(CONCURRENCIES)]
            names = list(running) if number // len(CONCURRENCIES) % 2 else list(running)[::-1]
            for name in names:
                found.setdefault((name, concurrency), []).append(measure(running[name], concurrency))
    table = Table(title=f"over the uncapped server, {rounds} rounds: median (quartiles)")
    for column in (
        "server",
        "concurrency",
        "output tokens/s",
        "throughput",
        "speed of a token (1 / TPOT)",
        "of its quick steps",
    ):
        table.add_column(column, justify="left" if column == "server" else "right")
    for (name, concurrency), runs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        base = found["uncapped", concurrency]
        pairs = list(zip(runs, base, strict=True))
        table.add_row(
            name,
            str(concurrency),
            f"{statistics.median(run['output_throughput'] for run in runs):.0f}",
            spread([run["output_throughput"] / other["output_throughput"] for run, other in pairs]),
            spread([other["mean_tpot_ms"] / run["mean_tpot_ms"] for run, other in pairs]),
            spread([other["p25_itl_ms"] / run["p25_itl_ms"] for run, other in pairs]),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
