"""vLLM's engine core: each request gets its profile, once, and its blocks are kept apart in the prefix cache."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from axiscap.serving.request import Assignment, SettingsError
from axiscap.serving.scheduler import Control, Scheduling
from axiscap.serving.vllm import kv
from axiscap.serving.vllm.points import check_object, folder_of, settings_of
from axiscap_plugin.wrapping import wrap


class Core(Scheduling):
    """The engine core's part: it assigns a profile to every request, and changes profiles by its ``collective_rpc``."""

    key = "cache_salt"

    def __init__(self, core: Any) -> None:
        self._core = core
        self._settings = settings_of(core.vllm_config)
        self._folder = folder_of(core.vllm_config)
        workers = core.collective_rpc("axiscap_layers")
        missing = set(self._settings.layers) - {layer for layers in workers for layer in layers}
        if missing:
            raise SettingsError(f"axiscap: no worker holds the capped layers {sorted(missing)}")
        transfer = core.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == kv.SHARED:
            kv.separate_contents()
        if transfer is not None and transfer.kv_connector in kv.BY_REQUEST:
            kv.attach_content()
        rpc = core.collective_rpc
        control = Control(self._settings, self._folder, lambda *profile: rpc("axiscap_copy_profile", args=profile))
        super().__init__(control)
        wrap(core, "preprocess_add_request", self._add)
        wrap(core, "collective_rpc", self._change)
        wrap(core, "shutdown", self._shutdown)
        if self._settings.caps_written_only:
            from vllm.v1.core import kv_cache_utils

            check_object(kv_cache_utils, [_KEYS])
            wrap(kv_cache_utils, _KEYS, _from_the_first_written)

    def extra(self, request: Any) -> Mapping[str, Any] | None:
        extra: Mapping[str, Any] | None = request.sampling_params.extra_args
        return extra

    def carry(self, request: Any, extra: dict[str, Any]) -> None:
        request.sampling_params = copy.copy(request.sampling_params)  # in one process with its client, the client's own
        request.sampling_params.extra_args = extra

    def _add(self, original: Callable[..., Any], request: Any) -> Any:
        with self.control.lock:
            name = request.external_req_id or request.request_id
            assignment = self.assign(request, name, apart=not self._settings.caps_written_only)
            kv.check_handed(request.sampling_params.extra_args, assignment)
            added = original(request)
            self.control.track(added[0], assignment)
        if self._settings.check:
            wrap(self._core.scheduler, "schedule", _with_view)
        return added

    def _change(self, original: Callable[..., Any], method: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers three methods of ``collective_rpc``; the workers get all others."""
        control = self.control
        methods: dict[object, Callable[..., str]] = {
            "axiscap_load": control.load,
            "axiscap_retire": control.retire,
            "axiscap_move_floors": control.move_floors,
        }
        if method not in methods:
            return original(method, *args, **kwargs)
        bound = inspect.signature(original).bind(method, *args, **kwargs).arguments
        return [methods[method](*bound.get("args", ()), **(bound.get("kwargs") or {}))]

    def _shutdown(self, original: Callable[..., Any]) -> Any:
        shutil.rmtree(self._folder, ignore_errors=True)
        return original()


#: vLLM's function for what a block's hash depends on beside its tokens. Wrapped if only written rows are capped.
_KEYS = "generate_block_hash_extra_keys"


def _from_the_first_written(original: Callable[..., Any], request: Any, start: int, end: int, *args: Any) -> Any:
    """Keeps blocks apart from the first one on that has a written token. The blocks before hold the prompt alone, and
    have the same content as those of a request that is left alone.
    """
    keys, at = original(request, start, end, *args)
    assignment = Assignment.read(request.sampling_params.extra_args)
    if assignment.digest is not None and start <= request.num_prompt_tokens < end:
        keys = (*(keys or ()), ("cache_salt", assignment.salt))
    return keys, at


def _with_view(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Adds the digest of each request, as the scheduler knows it, to a step: the checking mode compares them."""
    step = original(*args, **kwargs)
    requests = original.__self__.requests  # type: ignore[attr-defined]
    step.axiscap_view = {name: requests[name].axiscap_digest for name in step.num_scheduled_tokens}
    return step
