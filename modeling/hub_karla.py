"""The Hub: files go up in one commit, and what it answers becomes one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@contextlib.contextmanager
def hub_errors(repo_id: str, consequence: str, *, write: bool, revision: str | None = None) -> Iterator[None]:
    """Inside `with`, errors of the Hub and of the way there are OSErrors of one sentence that ends in `consequence`.

    Args:
        repo_id: the repository, for the sentence.
        consequence: what has not happened, such as "nothing was pushed".
        write: whether the calls write to it.
        revision: of the repository, for the sentence.
    """
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no name of a repository; give `owner/name` of letters, digits, '-', '_' and '.'; {consequence}."
        ) from error
    except OfflineModeIsEnabled as error:
        raise OSError(
            f"HF_HUB_OFFLINE is set, so {repo_id} cannot be reached; unset it and try again; {consequence}."
        ) from error
    except LocalTokenNotFoundError as error:
        raise OSError(f"There is no token; log in with `hf auth login` or set HF_TOKEN; {consequence}.") from error
    except HfHubHTTPError as error:
        raise OSError(f"{_reason(error, repo_id, write, revision)}; {consequence}.") from error
    except ValueError as error:
        if not str(error).startswith("Invalid metadata in README.md"):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The Hub refuses the model card ({reason}); mend its first lines; {consequence}.") from error
    except (HTTPError, ConnectionError) as error:
        raise OSError(
            f"The Hub does not answer ({type(error).__name__}); check the network and try again; {consequence}."
        ) from error


def _reason(error: HfHubHTTPError, repo_id: str, write: bool, revision: str | None) -> str:
    status = error.response.status_code
    may = "write to" if write else "read"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'!r}; give a branch, tag or commit of it"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated; accept its terms on its page with the account of your token"
    if status == 401 and write:
        return f"The Hub wants a token that may write to {repo_id}; log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"The Hub has no {repo_id} that you may {may}; check the name, and for a private one log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return f"Your token may not {may} {repo_id}; use one that may"
    if status == 412:
        return f"Someone else pushed to {repo_id} in the meantime; pull what is there now and push again"
    return f"The Hub answers HTTP {status} for {repo_id}; try again later"


def open_repository(
    api: HfApi, repo_id: str, *, private: bool | None, revision: str | None, create_pr: bool
) -> ModelInfo:
    """Make a repository and a branch of it where they do not exist, and read the branch's head and files.

    Args:
        api: a client with a token that may write.
        repo_id: `owner/name`, or a name of the token's owner.
        private: whether a new one is private; None leaves it to the owner's settings.
        revision: the branch; None is `main`.
        create_pr: whether only a pull request will be made, for which a branch need not be writable.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def file_names(head: ModelInfo) -> set[str]:
    """Names of a repository's files."""
    return {file.rfilename for file in head.siblings or ()}


def commit_files(
    api: HfApi,
    head: ModelInfo,
    folder: Path,
    names: Iterable[str],
    stale: Iterable[str],
    *,
    message: str,
    description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Add and delete files of a repository in one commit, on condition that its head is still the one given.

    Args:
        api: a client with a token that may write.
        head: what `open_repository` read.
        folder: where the files to add are.
        names: files to add, by their paths in `folder`.
        stale: files to delete.
        message: first line of the commit.
        description: the lines below it.
        revision: the branch; None is `main`.
        create_pr: whether to make a pull request of it.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(folder / name)) for name in sorted(names)
    ]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    # not upload_folder, which sends several commits where it goes through Xet
    return api.create_commit(
        head.id,
        operations,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )
