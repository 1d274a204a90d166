"""`grade push`: upload what `grade export` writes to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from grade.commands.export import described, exported_checkpoint, write_export
from grade.config import Config
from grade.config.sealed import config_from_sealed
from grade.errors import GradeError, reason_of
from grade.hub_names import looks_local


def push_run(
    config: Config, run_dir: Path, repo: str, *, checkpoint: str, merged: bool, private: bool, revision: str | None
) -> None:
    """`grade push`: export to a temporary folder, and upload that. Whether it may be uploaded is found out before
    anything is loaded, and nothing is made at the hub before the export is whole.

    Args:
        config: the run's, with overrides.
        repo: NAME or OWNER/NAME.
        checkpoint: "best", "last", "step-N", or the folder of a checkpoint in the run's folder.
        merged: a whole model instead of an adapter.
        private: a repository that is made is for its owner alone.
        revision: branch, made if it is missing; None: the main one.
    """
    _check_name(repo)
    folder = exported_checkpoint(run_dir, checkpoint)
    api, console = HfApi(), Console()
    _check_access(api)
    made = config_from_sealed(run_dir / "config.yaml")  # what is uploaded is the run's, whatever loads it here
    needs_base = not merged and made.model.finetuning == "lora"
    if needs_base and (looks_local(made.model.name) or ":" in made.model.name):
        console.print(
            f"warning: the base, {made.model.name}, is a folder here: without it nobody can load the adapter. With "
            "--merge the whole model is uploaded.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    with tempfile.TemporaryDirectory(prefix="grade-push-") as temporary:
        target = Path(temporary) / "export"
        done = write_export(config, run_dir, folder, merged, target)
        with _explained(f"REPO={repo} cannot be uploaded"):
            place = api.create_repo(repo, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(place.repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=place.repo_id,
                folder_path=target,
                revision=revision,
                commit_message=f"{made.name}, checkpoint {folder.name}, by grade push",
            )
    lines = [*described(done, made), f"Uploaded: {place}"]
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise GradeError(f"REPO={repo} is no name of a repository ({reason_of(error)}). Write OWNER/NAME.") from error


def _check_access(api: HfApi) -> None:
    """Refuse before any work what could not be uploaded after it."""
    if constants.HF_HUB_OFFLINE:
        raise GradeError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.")
    if huggingface_hub.get_token() is None:
        raise GradeError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN.")
    with _explained("the hub does not let you in"):
        api.whoami()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever goes wrong with the hub is told in words: its client raises errors of several libraries."""
    try:
        yield
    except GradeError:
        raise
    except Exception as error:
        raise GradeError(
            f"{what}: {reason_of(error)}. Check the network, the token's right to write (`hf auth whoami`) and REPO."
        ) from error
