"""Upload of a saved adapter to a repository of the Hugging Face Hub."""

from __future__ import annotations

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from peftfx.errors import PeftfxError, first_line


def upload(
    folder: str, repo_id: str, token: str | None, private: bool | None, revision: str | None, message: str
) -> str:
    """Upload a folder to the Hugging Face Hub, and return the repository's address.

    Raises:
        PeftfxError: the Hub cannot be reached, or refuses the upload.
    """
    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE, or save_pretrained(directory) and upload that later"
        raise PeftfxError("the hub cannot be reached: HF_HUB_OFFLINE is set", repo_id, hint)
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        hint = "log in (hf auth login) or pass token=; or save_pretrained(directory) and upload that later"
        raise PeftfxError(f"the hub did not take the adapter: {first_line(error)}", repo_id, hint) from error
    return str(address)
