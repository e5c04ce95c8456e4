"""Pushing an export to the Hugging Face hub."""

import shlex
from pathlib import Path

from p828.errors import ConfigError, RunFailed

# Of an earlier push. transformers would take `model.safetensors` before the shards of a larger model.
REPLACED = ("*.safetensors", "*.safetensors.index.json")
MESSAGE = "Export from p828"
LONGEST_CAUSE = 300  # characters of a library's message that are passed on


def check_push(repo: str) -> None:
    """Refuse what can only fail, before anything is exported; asks nobody.

    Raises ConfigError for a name that the hub does not take, without a token, and in offline mode.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push {repo[:80]!r}: {_in_short(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push {repo}: HF_HUB_OFFLINE is set")
    if not get_token():
        raise ConfigError(f"--push {repo}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push(export: Path, repo: str) -> str:
    """Put a directory's files, or a single file, into a repository on the hub; returns the repository's address.

    A repository that is not there is made, and is private; one that is there stays as visible as it is, and keeps files
    that are not replaced, but for other weights. Raises RunFailed whatever goes wrong; the export is left as it is.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        made = hub.create_repo(repo, private=True, exist_ok=True)
        if export.is_dir():
            hub.upload_folder(
                repo_id=made.repo_id, folder_path=export, commit_message=MESSAGE, delete_patterns=list(REPLACED)
            )
        else:
            hub.upload_file(
                repo_id=made.repo_id, path_or_fileobj=export, path_in_repo=export.name, commit_message=MESSAGE
            )
    except Exception as error:  # which classes stand for a dead network depends on the client's HTTP library
        raise RunFailed(
            f"--push {repo}: {_in_words(error)}\n"
            f"{export} is complete; to push it again: hf upload {repo} {shlex.quote(str(export))} --private"
        ) from error
    return str(made)


def _in_words(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the token; run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there: {_in_short(error)}"
    return f"the push failed: {_in_short(error)}"


def _in_short(error: BaseException) -> str:
    """The message in one line, with that of the error behind it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if error.__cause__ is not None and isinstance(error, RuntimeError):  # which says for which file
        text = f"{text} {_in_short(error.__cause__)}"
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " …"
