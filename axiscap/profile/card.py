"""The model card of a profile on a hub: Markdown after a YAML header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axiscap.profile.evidence import Evidence
from axiscap.profile.hub import FILE


def render_card(model: str, digest: str, facts: Mapping[str, str]) -> str:
    """The text of the card, with a table of facts."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: axiscap
tags: [activation-capping, assistant-axis]
---

# An AxisCap profile for {model}

It lifts the rows of {model} that fall below a floor on the Assistant Axis
([arXiv 2601.10387](https://arxiv.org/abs/2601.10387)) back to it, and leaves the others alone.

| | |
|---|---|
{table}

```python
import axiscap

profile = axiscap.CapProfile.from_pretrained("REPOSITORY", revision="COMMIT")
with axiscap.install(model, profile):
    model.generate(**inputs)
```

A server takes `hf://REPOSITORY/{FILE}#{digest}`; the digest says which content it must have.
`axiscap inspect` prints all that is known of the profile. It fits this model alone.
"""


def describe_floors(facts: Mapping[str, Any]) -> str:
    """The provenance's entry about the floors, in words."""
    if not {"percentile", "population"} <= facts.keys():
        return "not stated"
    text = f"percentile {facts['percentile']} of {facts['population']}"
    if "target_percentile" in facts:
        text += f"; rows below are lifted to percentile {facts['target_percentile']}"
    return text


def describe_evidence(evidence: Evidence) -> dict[str, str]:
    """The held-out AUC at the best layer, over all roles and of each kind of role."""
    best = evidence.best_layer
    low, high = evidence.auc_interval
    facts = {f"held-out AUC, layer {best}": f"{evidence.auc[best]:.3f} (95 %: {low:.3f} to {high:.3f})"}
    return facts | {
        f"held-out AUC of {kind} roles": f"{auc[best]:.3f}" for kind, auc in sorted(evidence.auc_by_kind.items())
    }
