"""What AxisCap relies on in vLLM: the methods that it wraps or calls, and its settings in vLLM's configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from axiscap.serving import shared_folder
from axiscap.serving.request import KEY, SettingsError
from axiscap.serving.settings import Settings

#: The versions that were run (docs/engines.md).
TESTED = "0.27 to 0.32"


class Point(NamedTuple):
    """A method of vLLM's that is wrapped or called, with the parameters that it must have, and what it is for."""

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    use: str


_CORE, _WORKER = "vllm.v1.engine.core", "vllm.v1.worker.worker_base"
_PROTOCOLS = "vllm.entrypoints.openai"
POINTS = (
    Point("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", (), "the configuration is read there"),
    Point("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("params",), "choices are refused"),
    *(
        Point(f"{_PROTOCOLS}.{kind}.protocol", f"{request}Request", "to_beam_search_params", (), "beams are refused")
        for kind, request in (("chat_completion", "ChatCompletion"), ("completion", "Completion"))
    ),
    Point(_CORE, "EngineCore", "_initialize_kv_caches", ("vllm_config",), "the scheduler's part begins there"),
    Point(_CORE, "EngineCore", "preprocess_add_request", ("request",), "each request's profile is decided"),
    Point(_CORE, "EngineCore", "collective_rpc", ("method", "args", "kwargs"), "profiles change, and reach workers"),
    Point(_CORE, "EngineCore", "shutdown", (), "the server's folder goes"),
    Point("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", (), "the checking mode sees a step"),
    Point(_WORKER, "WorkerWrapperBase", "init_device", (), "a worker's part begins there"),
)
#: Of a worker and its model runner: as objects, since each platform has classes of its own.
RUNNER_POINTS = ("load_model", "_dummy_run", "execute_model", "get_model")
WORKER_POINTS = ("compile_or_warm_up_model",)


def check_points() -> None:
    """Raises SettingsError where this vLLM has not what capping stands on: it would start, and not be capped."""
    for point in POINTS:
        try:
            owner = getattr(importlib.import_module(point.module), point.owner)
            parameters = inspect.signature(getattr(owner, point.name)).parameters
        except (ImportError, AttributeError):
            raise _unknown(f"{point.owner}.{point.name}", point.use) from None
        if missing := [name for name in point.parameters if name not in parameters]:
            raise _unknown(f"parameter {missing[0]} of {point.owner}.{point.name}", point.use)


def check_object(owner: Any, names: Sequence[str]) -> None:
    for name in names:
        if not hasattr(owner, name):
            kind = getattr(owner, "__name__", type(owner).__name__)
            raise _unknown(f"{kind}.{name}", "the rows of a step, or blocks of the cache, are known by it")


def _unknown(what: str, use: str) -> SettingsError:
    import vllm

    return SettingsError(
        f"axiscap: vLLM {vllm.__version__} has no {what} ({use}), so that it cannot be capped; {TESTED} can"
    )


def settings_of(config: Any) -> Settings:
    return Settings.from_json(config.additional_config[KEY])


def folder_of(config: Any) -> Path:
    return shared_folder.folder(config.instance_id)
