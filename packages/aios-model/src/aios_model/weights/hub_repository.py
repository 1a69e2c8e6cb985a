"""A model repository on the Hugging Face hub, with every failure explained. No torch here.

Downloading, resuming, progress bars, login and the cache are huggingface-hub's; it is imported when the first
repository is asked for, since most runs never need it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from aios_model.errors import ModelError, ModelNotFoundError

_logger = logging.getLogger(__name__)


class HubRepository:
    """One repository at one revision.

    Every method raises ModelNotFoundError with what was tried and what to do about it.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; None for the main branch.
        cache_dir: Where downloads are kept; None for huggingface-hub's own cache.
    """

    def __init__(self, repo_id: str, *, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> None:
        self.repo_id = repo_id
        self._revision = revision
        self._cache_dir = None if cache_dir is None else Path(cache_dir)

    def fetch_folder(self, patterns: Sequence[str]) -> Path:
        """Download what matches `patterns` at the top of the repository; the folder that holds it."""
        from huggingface_hub import snapshot_download

        return self._fetch(
            lambda cached: snapshot_download(
                self.repo_id,
                revision=self._revision,
                cache_dir=self._cache_dir,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=cached,
            )
        )

    def fetch_file(self, filename: str) -> Path:
        """Download one file; where it lies, under its own name."""
        from huggingface_hub import hf_hub_download

        return self._fetch(
            lambda cached: hf_hub_download(
                self.repo_id,
                filename,
                revision=self._revision,
                cache_dir=self._cache_dir,
                local_files_only=cached,
            )
        )

    def list_files(self) -> list[str]:
        """Paths of all files in the repository; this cannot be answered from the cache."""
        from huggingface_hub import list_repo_files

        try:
            return list_repo_files(self.repo_id, revision=self._revision)
        except Exception as error:
            raise self._refusal(error) or self._unreachable(error) from error

    def _fetch(self, download: Callable[[bool], str]) -> Path:
        """`download(False)` asks the hub, `download(True)` only the cache."""
        # The exceptions come from huggingface-hub, from whichever HTTP library its version uses, and from the disk;
        # they share no base class but Exception, and all of them mean that the model is not to be had.
        try:
            return Path(download(False))
        except Exception as error:
            refusal = self._refusal(error)
            if refusal is not None:
                raise refusal from error
            failure = error
        try:
            folder = Path(download(True))
        except Exception as error:
            raise self._unreachable(failure) from error
        _logger.warning("%s could not be reached (%s); using the cached copy", self.repo_id, _first_line(failure))
        return folder

    def _refusal(self, error: Exception) -> ModelError | None:
        """What to say if the hub was reached and said no; None if it was not, and the cache may help."""
        from huggingface_hub import errors

        revision = f" at revision {self._revision!r}" if self._revision else ""
        if isinstance(error, errors.GatedRepoError) or _status(error) == 403:
            return ModelNotFoundError(
                f"access to {self.repo_id!r} is restricted. Accept its terms at https://huggingface.co/{self.repo_id}, "
                "then log in with `hf auth login` or set HF_TOKEN."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFoundError(
                f"{self.repo_id!r} has no revision {self._revision!r}; leave it out for the newest"
            )
        if isinstance(error, errors.RepositoryNotFoundError) or _status(error) == 401:
            return ModelNotFoundError(
                f"there is no file or folder {self.repo_id!r}, and no such model on the Hugging Face hub: check the "
                "spelling (org/name). If it is private, log in with `hf auth login` or set HF_TOKEN."
            )
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return ModelNotFoundError(f"{self.repo_id!r}{revision} has no such file: {_first_line(error)}")
        if isinstance(error, errors.HFValidationError):
            return ModelNotFoundError(
                f"there is no file or folder {self.repo_id!r}, and it cannot be a hub id: {error}"
            )
        return None

    def _unreachable(self, error: Exception) -> ModelNotFoundError:
        from huggingface_hub import constants

        cache = self._cache_dir or constants.HF_HUB_CACHE
        if constants.HF_HUB_OFFLINE:
            tried, remedy = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
        else:
            tried = f"{constants.ENDPOINT} did not deliver it ({type(error).__name__}: {_first_line(error)})"
            remedy = "check the connection and try again (a partial download is resumed)"
        return ModelNotFoundError(
            f"there is no file or folder {self.repo_id!r}; {tried}, and the cache in {cache} does not hold all of it. "
            f"Either {remedy}, or copy the model here and give its folder, or leave the model out for the bundled one."
        )


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
