"""What the tests share: random inputs, tiny models of many architectures, and the real demo model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, settings

import axiscap.ops
from axiscap import _C, CapProfile, models

# Machines are shared: a slow example is no failure.
settings.register_profile("axiscap", deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
settings.load_profile("axiscap")

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED_PROFILE = REPOSITORY / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"


def samples_of(folder: Path) -> int:
    """How many finished samples the logs of Inspect in a folder have on disk."""
    count = 0
    for path in folder.glob("*.eval"):
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
            count += sum(name.startswith("samples/") for name in file.namelist())
    return count


def free_port() -> int:
    """Not one of those that connections take by themselves: a server's own ranks would, while it starts."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := random.SystemRandom().randrange(20000, 30000)))
            return port


def python_blocks(page: str) -> list[str]:
    """The Python of a page of the documentation, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (REPOSITORY / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit rows, float32."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def profile_for(model: torch.nn.Module, layers: list[int], floor: float, *, directions: int = 1) -> CapProfile:
    """A profile of random axes that fits a model."""
    config = models.text_config(model)
    axes = unit(len(layers), directions, config.hidden_size, seed=1)
    facts = {"model": {"num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size}}
    return CapProfile(layers, axes, torch.full((len(layers), directions), floor), facts)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits, so that NaN equals NaN and -0 differs from 0."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differs = (bits(actual) != bits(expected)).nonzero()
    assert len(differs) == 0, f"{len(differs)} elements differ, the first at {differs[0].tolist()}"


class OnCuda:
    """A module of ops, on a GPU, for tensors of the CPU: they go there, and come back changed."""

    def __init__(self, module) -> None:
        self.module = module

    def __getattr__(self, name: str):
        op = getattr(self.module, name)

        def call(*args, **kwargs):
            pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

            def there(value):
                if isinstance(value, list):
                    return [there(one) for one in value]
                if not isinstance(value, torch.Tensor):
                    return value
                assume(value.shape[-1:] < (8193,))  # wider rows are an error on a GPU
                pairs.append(
                    (value, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda"))
                )
                return pairs[-1][1].copy_(value)

            def back(value):
                if isinstance(value, tuple | list):
                    return type(value)(back(one) for one in value)
                return next((here for here, gpu in pairs if gpu is value), value.cpu())

            result = op(*[there(value) for value in args], **{key: there(value) for key, value in kwargs.items()})
            for here, gpu in pairs:
                here.copy_(gpu)
            return back(result)

        return call


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """Each device that the ops run on."""
    if request.param == "cuda" and not (torch.cuda.is_available() and _C.accelerator()):
        pytest.skip("needs a CUDA GPU and kernels built for it")
    return request.param


@pytest.fixture
def ops(device):
    """``axiscap.ops`` on the device."""
    return axiscap.ops if device == "cpu" else OnCuda(axiscap.ops)


@pytest.fixture
def library(device):
    """``torch.ops.axiscap`` on the device."""
    return torch.ops.axiscap if device == "cpu" else OnCuda(torch.ops.axiscap)


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct and its tokenizer, float32."""
    return models.load()


@pytest.fixture(scope="session")
def refusals(demo_model) -> torch.Tensor:
    """Its directions of refusal."""
    from axiscap.calibrate import Settings, refusal, rollouts  # the ops' tests also run without transformers

    settings = Settings(models.DEFAULT_MODEL, "torch.float32")
    return refusal.directions(rollouts.TransformersEngine(*demo_model, settings))


@pytest.fixture(scope="session")
def shipped_profile() -> CapProfile:
    return CapProfile.load(SHIPPED_PROFILE)


def template_rows_that_fire(model, tokenizer, profile: CapProfile, requests: list[str]) -> list[tuple[str, int, str]]:
    """The rows of the chat template, all but those of the request's own text, that lie below a floor: the request, the
    layer and the token of each.
    """
    fired = []
    with axiscap.install(model, profile) as cap:
        for request in requests:
            chat = [{"role": "user", "content": request}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
            begin, offsets = text.index(request), encoded.pop("offset_mapping")[0]
            in_template = (offsets[:, 1] <= begin) | (offsets[:, 0] >= begin + len(request))
            with torch.no_grad():
                model(**encoded)
            for layer, floors in zip(profile.layers, profile.floors, strict=True):
                below = (cap.projections()[layer][0] < floors).any(-1) & in_template
                fired += [(request, layer, tokenizer.decode(encoded["input_ids"][0, row])) for row in below.nonzero()]
    return fired


def turned(model, tokenizer, profile: CapProfile, **knows) -> CapProfile:
    """The mean difference at layers 14 to 21, each turned so that the first token's sink lies below its floor, which is
    the 5th percentile of the tokens of plain prose; read and corrected along it, as published.
    """
    layers = list(range(14, 22))
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(30)}
    lines = (REPOSITORY / "axiscap" / "data" / "plain.jsonl").read_text().splitlines()
    with models.watched_layers(model, lambda layer, hidden: seen[layer].append(hidden[0])), torch.inference_mode():
        for line in lines:
            model(**tokenizer(json.loads(line)["text"], return_tensors="pt"))
    axes, floors = [], []
    for layer in layers:
        axis = torch.nn.functional.normalize(profile.lift_all[layer], dim=-1)
        axis = axis if seen[layer][0][0] @ axis < 0 else -axis
        axes.append(axis)
        floors.append(torch.quantile(torch.cat([rows[1:] for rows in seen[layer]]) @ axis, 0.05))
    facts = {"model": dict(profile.model_facts)}
    return CapProfile(layers, torch.stack(axes)[:, None], torch.stack(floors)[:, None], facts, **knows)


@pytest.fixture(autouse=True)
def _isolated_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def lower_instruction_sets() -> list[str]:
    """Those that this machine can be asked for, beside its best."""
    best = os.environ.get("AXISCAP_ISA") or __import__("axiscap._C", fromlist=["isa"]).isa()
    order = ["baseline", "avx2", "avx512", "avx512bf16"]
    return order[: order.index(best) + 1] if best in order else []
