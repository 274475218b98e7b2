"""A vLLM worker that caps without AxisCap, by the published operations in forward hooks on the profile's layers."""

from __future__ import annotations

import os

from vllm.v1.worker.cpu_worker import CPUWorker

from axiscap import CapProfile
from axiscap.bench import published


class HookedWorker(CPUWorker):
    def load_model(self, **kwargs: object) -> None:
        super().load_model(**kwargs)
        profile = CapProfile.load(os.environ["AXISCAP_BENCHED"])
        blocks = self.model_runner.get_model().model.layers
        for at, layer in enumerate(profile.layers):
            # The published form is a ceiling on the negated axis.
            vector, cap = -profile.axes[at, 0], -profile.floors[at, 0]

            def hook(module, args, output, vector=vector, cap=cap):
                hidden, residual = output
                total = hidden + residual
                return hidden, residual + (published(total, vector, cap) - total)

            blocks[layer].register_forward_hook(hook)
