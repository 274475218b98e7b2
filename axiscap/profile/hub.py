"""Profiles on a model hub, through huggingface_hub, which is imported only here and only when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: The name of the profile's file in a repository.
FILE = "profile.safetensors"


def download(repo: str, file: str, revision: str | None) -> Path:
    """Downloads a file of a repository, unless the local cache has it, and returns its path.

    Raises
    ------
    ModuleNotFoundError
        huggingface_hub is missing; the message names the extra.
    OSError
        the repository, the revision or the file does not exist, or the hub cannot be reached.
    """
    hub = _import_hub()
    try:
        return Path(hub.hf_hub_download(repo, file, revision=revision))
    except hub.errors.HFValidationError as error:
        raise OSError(f"{repo}: neither a folder nor a repository's name: {error}") from None
    except OSError as error:  # all errors of huggingface_hub derive from it
        raise OSError(f"{repo}: cannot download {file} from the hub: {error}") from None


def upload(folder: Path, repo: str, message: str, *, private: bool) -> str:
    """Uploads a folder's files; returns the commit's URL.

    Raises
    ------
    ModuleNotFoundError
        huggingface_hub is missing; the message names the extra.
    OSError
        the hub cannot be reached, or refuses.
    """
    hub = _import_hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message).commit_url)
    except hub.errors.HFValidationError as error:
        raise OSError(f"{repo}: not the name of a repository: {error}") from None
    except OSError as error:
        raise OSError(f"{repo}: the hub does not take the profile: {error}") from None


def _import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise ModuleNotFoundError("a hub needs huggingface_hub: pip install 'axiscap[calibrate]'") from None
    return huggingface_hub
