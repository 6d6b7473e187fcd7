"""A checkpoint or an export of ours, put on the Hub by huggingface_hub. No torch."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.errors import CheckpointError, HubError, UnsuitableOptionError, foreign
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.folders import MANIFEST, Listing
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.run_record import RECORD
from slimvlm.export.running.manifest import Manifest, check_files

# Weights of an earlier push: a single file beside new shards would be loaded in their place.
STALE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a folder is now; `commit` is the address of the last one."""

    repo: str
    url: str
    commit: str
    files: int


def push_folder(
    folder: str | os.PathLike[str], repo: str, progress: Progress = silent, *, private: bool = False
) -> Pushed:
    """Uploads the files that the manifest of `folder` names, and the manifest; others that lie there stay.

    The repository is made if it is not there. What an interrupted upload left on the Hub is not sent again.

    Args:
        repo: `owner/name` on the Hub.
        private: a repository that is made is private; one that is there stays what it is.

    Raises:
        CheckpointError: it is no folder of ours, or files are missing or were changed.
        UnsuitableOptionError, HubError: as `check_hub`; or the Hub refused, or could not be reached.
    """
    folder = Path(folder).expanduser()
    check_hub(repo)
    names = _whole(folder)
    from huggingface_hub import HfApi

    api, again = HfApi(library_name="slimvlm"), "the folder is as it was; the same command goes on"
    progress("push", 0, 1, repo)
    with foreign(f"{repo} was not made on the Hub", again, HubError):
        made = api.create_repo(repo, private=private or None, exist_ok=True)
    with foreign(f"{folder} did not get to {repo} as a whole", again, HubError):
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Upload by slimvlm",
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=list(STALE) if any(name in names for name in STALE[::2]) else None,
        )
    progress("push", 1, 1, repo)
    return Pushed(made.repo_id, str(made), done.commit_url, len(names))


def check_hub(repo: str) -> None:
    """Find out before any work that a push could not begin.

    Raises:
        UnsuitableOptionError: `repo` cannot be the name of a repository.
        HubError: there is no token, or huggingface_hub was told to stay offline.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UnsuitableOptionError(f"{repo!r} is no name of a repository; give OWNER/NAME ({error})") from None
    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it")
    if get_token() is None:
        raise HubError(f"there is no token to push to {repo} with; set HF_TOKEN, or log in with `hf auth login`")


def _whole(folder: Path) -> list[str]:
    """The files to push.

    Raises:
        CheckpointError: see `push_folder`.
    """
    if not (folder / MANIFEST).is_file():
        inside = "; give its folder model or export" if (folder / RECORD).is_file() else ""
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it is no checkpoint or export that slimvlm wrote{inside}"
        )
    listed = read(folder / MANIFEST, Listing)["files"]
    if "config.json" not in listed:
        raise CheckpointError(f"{folder / MANIFEST} names no config.json, so it is not one that slimvlm wrote")
    if wrong := check_files(folder, listed):
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{folder} is not as it was written: {wrong[0]}{more}; write it again")
    if "artifacts" in read(folder / MANIFEST, dict) and not Manifest.read(folder).ok:
        raise CheckpointError(f"{folder} failed its checks ({MANIFEST}: failures), and is not passed on; export again")
    return [*listed, MANIFEST]
