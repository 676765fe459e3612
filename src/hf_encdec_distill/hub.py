"""One commit to the Hub, whole or not at all."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token


_CHANGED = 412  # HTTP status: the branch is not at the commit any more that this one was made for
_TRIES = 20


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    commit_message: str,
    *,
    replaces: Callable[[list[str]], Iterable[str]],
    follows: Callable[[str, list[str]], Mapping[str, bytes]] = lambda commit, names: {},
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Make the repository and the branch where they are not there, and commit to it.

    Nothing is lost where others commit at the same time: a commit is made for the branch as it was read, and made
    again where that has changed meanwhile.

    Not `HfApi.upload_folder`: from huggingface_hub 2 on that makes several commits of one folder.

    Args:
        files: name in the repository -> file, or what is to be in it.
        repo_id: `user/name`, or `name` for one of the user's own.
        repo_type: `"model"` or `"dataset"`.
        replaces: which of the names in the repository are deleted in the same commit, unless they are in `files`.
        follows: further files, whose content depends on the commit that is there and the names in it.
        private: of a repository that is made; None leaves it to the user's or the organisation's default.
        revision: branch, made of main if it is not there.
        create_pr: a pull request to that branch in place of a commit on it.
        token: by default the one of the environment, or that `hf auth login` stored.

    Raises:
        OSError: there is no token, the Hub refused or cannot be reached, `private` was asked of a repository that is
            public, or `follows` raised an error. The branch is as it was; where only the answer was lost, all has gone
            up.
    """
    api = HfApi(token=token)
    if not (token or get_token()):
        raise OSError(f"no token to write to {api.endpoint} with: log in (hf auth login), or set HF_TOKEN")
    try:
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise OSError("it is there already, and public: push without private, or to another name")
        # A pull request's branch, refs/pr/N, is there, and cannot be made.
        if revision and not create_pr and not api.revision_exists(repo_id, revision, repo_type=repo_type):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        adding = [CommitOperationAdd(name, file) for name, file in files.items()]  # what has gone up stays there
        for attempt in range(_TRIES):
            head = api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha
            assert head is not None, "what is made has a commit"
            there = api.list_repo_files(repo_id, repo_type=repo_type, revision=head)
            more = follows(head, there)
            gone = set(replaces(there)) - set(files) - set(more)
            try:
                return api.create_commit(
                    repo_id,
                    [
                        *(add for add in adding if add.path_in_repo not in more),
                        *(CommitOperationAdd(name, content) for name, content in more.items()),
                        *(CommitOperationDelete(name) for name in sorted(gone)),
                    ],
                    commit_message=commit_message,
                    repo_type=repo_type,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=head,
                )
            except Exception as error:  # see below
                changed = getattr(getattr(error, "response", None), "status_code", None) == _CHANGED
                if not changed or attempt == _TRIES - 1:
                    raise
            time.sleep(random.uniform(0, min(2**attempt, 30)))  # full jitter: others were as quick
        raise AssertionError("the last try returns or raises")
    except Exception as error:  # of the client's HTTP library, which is not the same for all its versions
        # Of one file among several the client says only in the cause why it was not uploaded.
        reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else str(error)
        raise OSError(f"{repo_id} was not uploaded to {api.endpoint}: {reason}") from error
