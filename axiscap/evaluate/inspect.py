"""Inspect's entry point: models under a cap, so that every task runs under one, and tasks of AxisCap's own::

    inspect eval inspect_evals/gsm8k --model axiscap/FOLDER -M profile=PROFILE
    inspect eval inspect_evals/gsm8k --model axiscap-server/MODEL --model-base-url http://HOST:8000/v1 -M profile=NAME

``axiscap/FOLDER`` is a local folder, a hub's name, or ``axiscap/smollm2-135m-instruct``. Model arguments: ``profile``
(a profile file; without it the model is uncapped), ``positions`` (``all`` or ``generated``), ``dtype`` (``auto``), and
those of Inspect's own ``hf`` provider, such as ``batch_size`` (32), ``device``, ``do_sample`` and ``chat_template``.

``axiscap-server/MODEL`` is what a vLLM or SGLang server with AxisCap calls its model. Model arguments: ``engine``
(``vllm`` or ``sglang``), ``profile`` (one that the operator lets requests choose, or ``off``; without it the server's
default), and those of Inspect's own ``openai-api`` provider.

An answer's random numbers come of the seed, the sample, its epoch and the call alone. So two runs, one capped and one
not, are pairs, whatever was answered beside a sample and in whatever order. Under a profile the sample's metadata has
``axiscap``, a list of what was done to each of its answers, by layer: ``rows``, those of prompt and answer that were
looked at, ``fired``, those that were below a floor, and the ``lowest`` and ``mean`` projection on the first direction
(null where no row was looked at). A server does not say; its log of requests does.
"""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi

from axiscap.evaluate.tasks import (  # noqa: F401  (Inspect finds them here)
    arithmetic,
    choices,
    code,
    instructions,
    over_refusal,
    persona_jailbreak,
)


@modelapi(name="axiscap")
def axiscap() -> type[ModelAPI]:
    """A model in this process."""
    from axiscap.evaluate.local import CappedModel

    return CappedModel


@modelapi(name="axiscap-server")
def axiscap_server() -> type[ModelAPI]:
    """A model behind a server."""
    from axiscap.evaluate.served import ServedModel

    return ServedModel
