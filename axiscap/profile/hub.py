"""A hub of models, where profiles are shared as models are: by huggingface_hub, imported where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A profile's name in a repository.
FILE = "profile.safetensors"


def download(repo: str, file: str, revision: str | None) -> Path:
    """Where a repository's file lies after it was downloaded, or has been lying since.

    Raises
    ------
    ModuleNotFoundError
        naming the extra, without huggingface_hub.
    OSError
        the repository, the revision or the file is not there, or the hub cannot be reached.
    """
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(repo, file, revision=revision))
    except hub.errors.HFValidationError as error:
        raise OSError(f"{repo}: neither a folder nor a repository's name: {error}") from None
    except OSError as error:  # of huggingface_hub's own kinds
        raise OSError(f"{repo}: cannot download {file} from the hub: {error}") from None


def upload(folder: Path, repo: str, message: str, *, private: bool) -> str:
    """Uploads a folder's files; returns the commit's URL.

    Raises
    ------
    ModuleNotFoundError
        naming the extra, without huggingface_hub.
    OSError
        the hub cannot be reached, or does not let you.
    """
    hub = _hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message).commit_url)
    except hub.errors.HFValidationError as error:
        raise OSError(f"{repo}: not the name of a repository: {error}") from None
    except OSError as error:
        raise OSError(f"{repo}: the hub does not take the profile: {error}") from None


def card(model: str, digest: str, facts: Mapping[str, str]) -> str:
    """A card as a hub shows it, Markdown with YAML in front, of what is known of a profile for a model."""
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


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a hub needs huggingface_hub: pip install 'axiscap[calibrate]'") from None
    return huggingface_hub
