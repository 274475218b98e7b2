"""What the tests share: random inputs, tiny models of many architectures, and the real demo model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from axiscap import CapProfile, models

# Machines are shared: a slow example is no failure.
settings.register_profile("axiscap", deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
settings.load_profile("axiscap")

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED_PROFILE = REPOSITORY / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"


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


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M-Instruct and its tokenizer, float32."""
    return models.load()


@pytest.fixture(scope="session")
def shipped_profile() -> CapProfile:
    return CapProfile.load(SHIPPED_PROFILE)


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
