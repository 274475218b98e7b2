"""What serving engines find by their entry points: looks whether capping is configured, and does nothing if it is not.

This stands outside the package, so that an AxisCap that cannot even be imported stops a server that is configured for
it. An engine only logs the failure of a plug-in's import, and would serve uncapped.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from axiscap_plugin.wrapping import KEY, is_nearly, wrap_in


def register_vllm() -> None:
    """``vllm.general_plugins``: called in every process of the engine, before the process does its part.

    A vLLM that has not what is wrapped here goes on where capping is not configured, and stops where it is.
    """
    wrapped = [
        wrap_in("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", _configure),
        wrap_in("vllm.v1.engine.core", "EngineCore", "_initialize_kv_caches", _start_core),
        wrap_in("vllm.v1.worker.worker_base", "WorkerWrapperBase", "init_device", _start_worker),
    ]
    if not all(wrapped):
        if "AXISCAP_CONFIG" in os.environ:
            from axiscap.serving.vllm.points import check_points

            check_points()
        wrap_in("vllm.config.vllm", "VllmConfig", "__post_init__", _refuse)


def register_sglang() -> None:
    """``sglang.srt.plugins``: called in every process of the engine, which has no options for plug-ins, but a file."""
    if "AXISCAP_CONFIG" not in os.environ:
        return
    try:
        from axiscap.serving.sglang.adapter import wrap_engine

        wrap_engine()
    except Exception as error:
        # SGLang logs what a plug-in raises and goes on, except this.
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _configure(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config = original(*args, **kwargs)
    options = config.additional_config if isinstance(config.additional_config, dict) else {}
    if "AXISCAP_CONFIG" in os.environ or any(is_nearly(key) or key == "profiles" for key in options):
        from axiscap.serving.vllm.front import configure

        # An engine in this same process loads these now, after the plug-in was; its own call comes too late for them.
        for module in ("vllm.v1.engine.core", "vllm.v1.worker.worker_base"):
            importlib.import_module(module)
        register_vllm()
        configure(config, options)
    return config


def _refuse(original: Callable[..., Any], config: Any) -> Any:
    """Of a vLLM that is another than this was made for: a configuration with AxisCap's goes no further."""
    original(config)
    if _configured(config):
        from axiscap.serving.vllm.points import check_points

        check_points()


def _configured(config: Any) -> bool:
    return isinstance(config.additional_config, dict) and KEY in config.additional_config


def _start_core(original: Callable[..., Any], core: Any, config: Any) -> Any:
    if _configured(config):
        from axiscap.serving.vllm.scheduler import Core

        Core(core)
    return original(core, config)


def _start_worker(original: Callable[..., Any], wrapper: Any) -> Any:
    result = original(wrapper)
    if _configured(wrapper.vllm_config):
        from axiscap.serving.vllm.worker import VllmWorker

        VllmWorker(wrapper.worker)
    return result
