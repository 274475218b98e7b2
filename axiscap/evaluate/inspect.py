"""Inspect's entry point: models under a cap, which run every task of Inspect, and AxisCap's own tasks::

    inspect eval inspect_evals/gsm8k --model axiscap/FOLDER -M profile=PROFILE
    inspect eval inspect_evals/gsm8k --model axiscap-server/MODEL --model-base-url http://HOST:8000/v1 -M profile=NAME

``axiscap/FOLDER`` is a local folder, a hub's name, or ``axiscap/smollm2-135m-instruct``. Model arguments: ``profile``
(a profile file; without it the model is uncapped), ``positions`` (``all`` or ``generated``), ``dtype`` (``auto``), and
those of Inspect's own ``hf`` provider, such as ``batch_size`` (32), ``device``, ``do_sample`` and ``chat_template``.

``axiscap-server/MODEL`` is what a vLLM or SGLang server with AxisCap calls its model. Model arguments: ``engine``
(``vllm`` or ``sglang``), ``profile`` (one that the operator lets requests choose, or ``off``; without it the server's
default), and those of Inspect's own ``openai-api`` provider.

The random numbers of an answer depend only on the seed, the sample, its epoch and the number of the call. So a capped
and an uncapped run form pairs, whatever their batches and their order. Under a profile, the sample's metadata has
``axiscap``: for each answer, what the profile did at each layer. ``rows`` counts the measured rows of prompt and
answer, ``fired`` those below a floor; ``lowest`` and ``mean`` are projections on the first direction (null without a
measured row). A served model has no such metadata; the server's log of requests has the figures.
"""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi

from axiscap.evaluate.tasks import (  # noqa: F401  (Inspect looks for tasks here)
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
