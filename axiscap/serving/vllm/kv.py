"""KV blocks that leave vLLM: the connectors that keep blocks of different contents apart.

A block depends on the content that capped its rows. vLLM's hashes of blocks include the digest, as a salt, so
connectors that use them are safe. A connector that uses the tokens alone gets the content as one more part of the
prompt. If one engine hands a prompt's blocks to another, request by request, the transfer parameters name the content,
and the other engine refuses a different one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from axiscap.serving.request import Assignment, RequestError
from axiscap_plugin.wrapping import wrap

#: Connectors that find blocks by vLLM's hashes.
BY_HASH = ("OffloadingConnector",)
#: vLLM's example of a store that several engines share: it goes by the prompt's tokens, and the identifiers of what is
#: in it beside text.
SHARED = "ExampleConnector"

#: Connectors by which one engine reads a prompt's blocks from the memory of another; a router carries the word.
BY_REQUEST = ("NixlConnector", "NixlPullConnector")
#: In a request, the word about blocks in another engine's memory; in that, what they hold.
_WORD, _CONTENT = "kv_transfer_params", "axiscap_content"
_NOBODYS = Assignment(None, None, "").prompt_salt


def attach_content() -> None:
    """Adds the content of a prompt's blocks to the parameters that go to another engine."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "_connector_finished", _with_word)


def _with_word(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    delay, word = original(scheduler, request)
    if word:
        word[_CONTENT] = Assignment.read(request.sampling_params.extra_args).prompt_salt
    return delay, word


def check_handed(extra: Mapping[str, Any] | None, assignment: Assignment) -> None:
    """Raises RequestError if a request continues from blocks of another content than its own.

    Parameters
    ----------
    extra
        what the request carries.
    """
    word = (extra or {}).get(_WORD)
    if not isinstance(word, Mapping) or not word.get("do_remote_prefill"):
        return
    content = word.get(_CONTENT, _NOBODYS)
    if content != assignment.prompt_salt:
        raise RequestError(
            f"the prompt was computed as {str(content)[:80]}, and this server would go on as {assignment.prompt_salt}: "
            "both must have the same profile; send it again"
        )


def separate_contents() -> None:
    """Makes the shared store treat a request's content as a part of its prompt."""
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

    wrap(ExampleConnector, "_found_match_for_request", _of_a_request)
    wrap(ExampleConnector, "update_state_after_alloc", _of_a_request)
    wrap(ExampleConnector, "build_connector_meta", _of_a_step)


def _with_content(request: Any) -> Any:
    """A request, or what a step says of a new one, whose prompt names the content that caps it."""
    marked = copy.copy(request)
    salt = Assignment.read(request.sampling_params.extra_args).salt
    marked.mm_features = [*request.mm_features, SimpleNamespace(identifier=salt)]
    return marked


def _of_a_request(original: Callable[..., Any], connector: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return original(connector, _with_content(request), *args, **kwargs)


def _of_a_step(original: Callable[..., Any], connector: Any, step: Any) -> Any:
    marked = copy.copy(step)
    marked.scheduled_new_reqs = [_with_content(new) for new in step.scheduled_new_reqs]
    return original(connector, marked)
