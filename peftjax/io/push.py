"""Upload an adapter to the Hugging Face hub."""

import re
from pathlib import Path

from peftjax.core.errors import UserError, root_cause
from peftjax.core.home import expand
from peftjax.io.adapter_method import read_method
from peftjax.io.model_card import CARD, REPOSITORY, make_card, without_mark


def push_adapter(directory: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Upload an adapter directory to the Hugging Face hub, with a model card.

    The repository is created if it does not exist. All files of the directory are uploaded in one commit, apart from
    hidden ones and subdirectories. If it has no README.md, a model card is made from the adapter's files. The token is
    taken from `hf auth login` or the environment variable HF_TOKEN.

    Args:
        directory: A directory from `save_adapter`, the train command, PEFT or AdapterHub.
        repo_id: The repository, "ORG/NAME". ORG is a user or an organization.
        private: Whether a new repository is private; default: as the user or the organization has set.

    Returns:
        The URL of the repository.

    Raises:
        UserError: The directory does not hold an adapter, nobody is logged in, the hub cannot be reached, or it refuses
            the upload.

    Examples:
        >>> import peftjax
        >>> from flax import nnx
        >>> model = peftjax.attach(peftjax.load_model("embedded"), peftjax.Lora(rank=4), rngs=nnx.Rngs(0))
        >>> peftjax.push_adapter(peftjax.save_adapter(model, "adapter"), "my-name/my-adapter")
        'https://huggingface.co/my-name/my-adapter'
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory = expand(directory)
    read_method(directory)
    files = {
        path.name: path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith(".")
    }
    card = without_mark(files.pop(CARD).read_text(encoding="utf-8")) if CARD in files else make_card(directory)
    check_push(repo_id)
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations.append(CommitOperationAdd(CARD, card.replace(REPOSITORY, repo_id).encode()))
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload adapter")
    except Exception as error:  # errors of the hub client's HTTP library also get here
        raise UserError(
            f"{directory} could not be uploaded to {repo_id}: {_reason(error)}; try again with push_adapter"
        ) from error
    return str(url)


def check_push(repo_id: str) -> None:
    """Check that the user can upload to a repository, without creating it.

    Raises:
        UserError: The name is not ORG/NAME, nobody is logged in, the hub cannot be reached, or the user cannot write there.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not exported

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"cannot upload to {repo_id!r}: the name must be ORG/NAME, such as my-name/my-adapter")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"cannot upload to {repo_id!r}: the hub does not allow this name ({_reason(error)})") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"cannot upload to {repo_id}: HF_HUB_OFFLINE is set; unset it, or upload later with push_adapter"
        )
    if get_token() is None:
        raise UserError(f"cannot upload to {repo_id}: not logged in to the hub; run `hf auth login` or set HF_TOKEN")
    try:
        user = HfApi().whoami()
    except HfHubHTTPError as error:
        raise UserError(
            f"cannot upload to {repo_id}: {constants.ENDPOINT} does not accept the token ({_reason(error)}); log in again with "
            "`hf auth login`"
        ) from error
    except Exception as error:  # of the hub client's HTTP library
        raise UserError(
            f"cannot upload to {repo_id}: {constants.ENDPOINT} cannot be reached ({_reason(error)})"
        ) from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    own = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
    if role != "fineGrained" and (owner := repo_id.partition("/")[0]) not in own:  # such a token may not see them all
        raise UserError(
            f"cannot upload to {repo_id}: {user['name']} is not a member of {owner}; choose one of {', '.join(own)}"
        )
    if role == "read":
        raise UserError(f"cannot upload to {repo_id}: the token is read-only; log in with one that has write access")


def _reason(error: BaseException) -> str:
    """The messages of an error and of its root cause, in one line."""
    errors = (error, root_cause(error))
    return "; ".join(dict.fromkeys(f"{type(each).__name__}: {' '.join(str(each).split())[:200]}" for each in errors))
