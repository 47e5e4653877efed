"""What every caller of the Hugging Face hub needs: no retry chatter, and a failure in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging


@contextmanager
def quiet_hub() -> Iterator[None]:
    """The hub client logs every retry as a warning; the error that follows says it once."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def hub_reason(error: Exception) -> str:
    """Why the hub did not give something, in a few words."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, words in (
        (GatedRepoError, "access to it must be granted first; log in with `hf auth login`"),
        (RepositoryNotFoundError, "there is no such repository, or it is private"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set and it is not in the cache"),
        (HFValidationError, "that is no repository id"),
    ):
        if any(isinstance(one, kind) for one in chain):
            return words
    if any(isinstance(one, (LocalEntryNotFoundError, ConnectionError)) for one in chain):
        return "the hub cannot be reached, and it is not in the cache"
    if any(isinstance(one, EntryNotFoundError) for one in chain):
        return "the repository lacks the file"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
