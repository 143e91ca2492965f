"""A file of ours that others have or will have: found by path or hub id, uploaded with its card."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    metadata_load,
)
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from ..arguments import typed
from ..warn import first_line, visible, warn
from .headed import HeadedFile
from .hub import at_revision, folder_of
from .lock import home_hint

_HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots\b[\\/]?(\w*)")  # a snapshot in the hub's cache
_MARKUP = re.compile(r"[`<>\[\]\\*~]|://|www\.", re.IGNORECASE)  # of links, images and the like

NOT_STATED, NOT_READ = "not stated in its card", "its card could not be read"


class SharedFile(HeadedFile, ABC):
    """A `HeadedFile` that others load by its hub id."""

    FILE_NAME: ClassVar[str]  # what it is called in a folder or hub repository
    COMMIT: ClassVar[str]  # the message of its upload, unless another is given

    @classmethod
    @typed
    def load(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open it: the file, a folder or hub repository that holds one of its usual name, or `id@revision`.

        Raises:
            FileNotFoundError: there is no such path or repository, or no such file in it.
            ValueError: the file is no such file, or a damaged one.
        """
        return cls(find_file(source, revision, cls.FILE_NAME), at_revision(str(source), revision))

    @typed
    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the file with its card to a hub repository, made if need be. Returns the commit's URL.

        A README.md in the repository is replaced.

        Raises:
            ValueError: `repo_id` is no hub id.
            OSError: the hub does not take it: no network, no token, no permission.

        Example:
            >>> prior.push_to_hub("me/prior", private=True)  # doctest: +SKIP
        """
        card = self.model_card(at_revision(repo_id, revision), token)
        api, message = HfApi(token=token), commit_message or self.COMMIT
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            files = {self.FILE_NAME: self.path, "README.md": str(card).encode()}
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url
        except HFValidationError as error:
            raise ValueError(f"{repo_id} is no hub id: name it as user/repository") from error
        except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
            raise OSError(f"{self.source} could not be uploaded to {repo_id}: {first_line(error)}") from error

    @abstractmethod
    def model_card(self, repo_id: str | None = None, token: str | None = None) -> ModelCard:
        """What `push_to_hub` writes as README.md."""


def find_file(source: str | Path, revision: str | None, name: str) -> Path:
    """Where the file is: `source` itself, or what is called `name` in the folder or hub repository `source`.

    Raises:
        FileNotFoundError: there is no such path or repository, or no such file in it.
        ValueError: it is a path, and a revision is given.
    """
    path = Path(source)
    if path.exists() and revision:
        raise ValueError(f"{source} is a local path, which has no revision {revision!r}: leave out revision=")
    if not path.exists() and path.suffix == ".safetensors":  # no hub id ends like this, so do not ask there
        raise FileNotFoundError(f"there is no file {source}{home_hint(source)}")
    path = folder_of(source, revision, [name])
    if path.is_dir():
        path /= name
        if not path.is_file():
            raise FileNotFoundError(f"{source} holds no {name}")
    return path


def hub_id(source: str) -> str | None:
    """The hub id that a model has, also where it was named by its snapshot in the hub's cache; None of another path.

    >>> hub_id("/cache/hub/models--org--vlm/snapshots/0a1b2c"), hub_id("org/vlm"), hub_id("/data/vlm")
    ('org/vlm', 'org/vlm', None)
    """
    if cached := _CACHED.search(source):
        return f"{cached[1]}/{cached[2]}"
    return source if _HUB_ID.fullmatch(source) and not Path(source).exists() else None


def shown(source: str) -> str:
    """What cards and headings call a model or file: its hub id, with a revision if one was named, or the last part of
    its path, which tells nothing of the disk that it lies on.

    >>> shown("/data/models/vlm"), shown("org/vlm@v1")
    ('vlm', 'org/vlm@v1')
    """
    here = Path(source).exists() or _CACHED.search(source)  # a path may have this sign, too
    name, at, revision = (source, "", "") if here else source.partition("@")
    if name := hub_id(name):
        return f"{name}{at}{revision}"
    return _last_part(source)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def repository_of(origin: Mapping) -> tuple[str, str | None] | None:
    """Hub id and commit of where weights come from (`id` and `revision`), also where it is a snapshot in the hub's
    cache; None of a folder, which has no revision, whatever it is called.

    >>> repository_of({"id": "/cache/hub/models--org--vlm/snapshots/0a1b2c", "revision": None})
    ('org/vlm', '0a1b2c')
    >>> repository_of({"id": "models/vlm", "revision": None})
    """
    if cached := _CACHED.search(origin["id"]):
        return f"{cached[1]}/{cached[2]}", cached[3] or origin["revision"]
    return None if origin["revision"] is None else (origin["id"], origin["revision"])


def place_of(origin: Mapping) -> tuple[str, str | None]:
    """Where weights are: hub id and commit, or the full path of a folder."""
    return repository_of(origin) or (os.path.realpath(origin["id"]), None)


def is_same_origin(one: Mapping, other: Mapping) -> bool:
    """Do two models come from one repository, whatever the commit, or lie in one folder? Of a folder that is not here,
    and of a copy of a repository, its name tells.

    >>> is_same_origin({"id": "org/vlm", "revision": "0a1b2c"}, {"id": "org/vlm", "revision": "3d4e5f"})
    True
    >>> is_same_origin({"id": "org/vlm", "revision": "0a1b2c"}, {"id": "/data/vlm", "revision": None})
    True
    """
    repositories = [repository_of(origin) for origin in (one, other)]
    if None not in repositories:
        return repositories[0][0] == repositories[1][0]
    if repositories == [None, None] and os.path.exists(one["id"]) and os.path.exists(other["id"]):
        return os.path.samefile(one["id"], other["id"])
    names = [
        repository[0] if repository else origin["id"]
        for repository, origin in zip(repositories, (one, other), strict=True)
    ]
    return _last_part(names[0]) == _last_part(names[1])


def with_full_path(origin: dict) -> dict:
    """The same weights for whoever goes on from another folder: with the whole path of a folder, of an adapter its
    base's, too. What has a revision is on the hub, whatever folder has its name."""
    place = origin["id"] if origin["revision"] else os.path.abspath(origin["id"])
    return {**origin, "id": place} | ({"base": with_full_path(origin["base"])} if "base" in origin else {})


def named(origin: Mapping) -> str:
    """What cards and headings call a model of which is known where it came from: as `shown`, and no folder by what
    looks like a hub id.

    >>> named({"id": "models/vlm", "revision": None}), named({"id": "org/vlm", "revision": "0a1b2c"})
    ('vlm', 'org/vlm')
    """
    repository = repository_of(origin)
    return repository[0] if repository else _last_part(origin["id"])


def pinned(origin: Mapping) -> str:
    """What names the same files for good: a hub id with its commit; of a path, its last part.

    >>> pinned({"id": "org/vlm", "revision": "0a1b2c"}), pinned({"id": "/data/vlm", "revision": None})
    ('org/vlm@0a1b2c', 'vlm')
    """
    return at_revision(*repository_of(origin) or (_last_part(origin["id"]),))


def is_pinned(origin: Mapping) -> bool:
    """Whether this names the same weights for good: a hub id with its commit, of an adapter its base's, too. What lies
    in a folder may be something else tomorrow.

    >>> is_pinned({"id": "org/vlm", "revision": "0a1b2c"}), is_pinned({"id": "models/vlm", "revision": None})
    (True, False)
    """
    return origin["revision"] is not None and ("base" not in origin or is_pinned(origin["base"]))


def find_license(origin: dict, token: str | None = None) -> dict | None:
    """What the card of a model (its `id` and `revision`) says of its licence: nothing is {}, and None that the card
    could not be read."""
    repository, card = repository_of(origin), Path(origin["id"], "README.md")
    try:
        if repository and not (_CACHED.search(origin["id"]) and card.is_file()):  # weights may lie there without it
            card = _card_of(*repository, token)
        elif not card.parent.exists():
            raise FileNotFoundError("the folder is not there")
        metadata = metadata_load(card) if Path(card).is_file() else None
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors; the parser YAML's
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):  # there is no card
            return {}
        warn(f"The licence of {origin['id']} is not known: its card cannot be read ({first_line(error)})")
        return None
    return {key: value for key, value in (metadata or {}).items() if key in ("license", "license_name", "license_link")}


def _card_of(repo_id: str, revision: str | None, token: str | None) -> str:
    """Where its card lies in the cache, after a download if need be. Without network it fails at the first refusal, or
    when nothing answers for three seconds: a download alone would try again and again for half a minute."""
    card = {"repo_id": repo_id, "filename": "README.md", "revision": revision}
    with suppress(LocalEntryNotFoundError):
        return hf_hub_download(**card, local_files_only=True)
    get_hf_file_metadata(hf_hub_url(**card), token=token, timeout=3)
    return hf_hub_download(**card, token=token)


def license_name(found: dict | None) -> str:
    """What `find_license` found, in words."""
    if found is None:
        return NOT_READ
    return str(found.get("license_name") or found.get("license") or NOT_STATED)


def common_license(licences: Iterable[dict | None]) -> dict:
    """The licence fields for the card of what was made of several models, found by `find_license`: theirs where they
    agree, "other" with all their names where they do not."""
    licences = [*licences]
    if not any(licences):
        return {}
    if all(licence == licences[0] for licence in licences):
        return licences[0]
    names = (license_name(licence).lower() if licence else "unstated" for licence in licences)
    return {
        "license": "other",
        "license_name": "-and-".join(dict.fromkeys(re.sub(r"[^a-z0-9.]+", "-", n) for n in names)),
    }


def state_licences(origins: Iterable[tuple[str, dict]], token: str | None = None) -> tuple[dict, str]:
    """What the card of something made of other models says of their licences: `common_license` of them, and a line for
    each. `origins`: (role, id and revision); `token`: for the cards of private or gated models."""
    licences = [(role, origin, find_license(origin, token)) for role, origin in origins]
    lines = (f"- {role} {in_markdown(named(origin))}: {in_markdown(license_name(of))}" for role, origin, of in licences)
    return common_license(of for *_, of in licences), "\n".join(lines)


def in_markdown(text: str) -> str:
    """Text from elsewhere in one line of a card: as code, in which nothing is a link or an image, where it has signs of
    these, and else as it is."""
    line = visible(" ".join(text.split())).encode("utf-8", "backslashreplace").decode()
    line = line.replace("|", "\\|")  # which would end a table's cell
    return f"`{line.replace('`', chr(39))}`" if _MARKUP.search(line.replace("\\|", "")) else line
