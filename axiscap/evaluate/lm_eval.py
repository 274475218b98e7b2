"""A model for the lm-evaluation-harness (lm-eval), so that its tasks run under a cap::

    python -m axiscap.evaluate.lm_eval --model axiscap --tasks gsm8k \\
        --model_args pretrained=FOLDER,profile=PROFILE,positions=all

This is ``lm_eval`` itself, which knows one model more. ``pretrained`` is a local folder, a hub's name, or
``smollm2-135m-instruct``; without ``profile`` the model is uncapped. All other arguments are those of its ``hf`` model.
"""

from __future__ import annotations

from typing import Any, Literal

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from axiscap import models
from axiscap.profile import CapProfile
from axiscap.transformers import install


@register_model("axiscap")
class CappedLM(HFLM):
    """lm-eval's ``hf`` model under a cap."""

    def __init__(
        self,
        pretrained: str,
        *,
        profile: str | None = None,
        positions: Literal["all", "generated"] = "all",
        **more: Any,
    ) -> None:
        super().__init__(pretrained=models.folder(pretrained), **more)
        self.cap = install(self.model, CapProfile.load(profile), positions=positions) if profile else None


if __name__ == "__main__":
    cli_evaluate()
