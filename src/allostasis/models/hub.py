"""The model hub: asked only when it answers, and what it refuses is said in one word."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit
from urllib.request import getproxies

from annotated_types import Gt

ANSWER_WITHIN = 2.0
"""Seconds. A look-up of a name can take the resolver half a minute to give up."""

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
PICKLES = ("pytorch_model*.bin",)
NOT_FILES = ("*/*", "consolidated*")  # other formats, and a second copy of the weights


class HubError(Exception):
    """The hub gave nothing.

    Args:
        state: One word or few, for the list of places looked at.
        advice: What to do about it, if anything beside what is always possible.
    """

    def __init__(self, state: str, advice: str | None = None) -> None:
        super().__init__(state)
        self.state, self.advice = state, advice


def is_reachable(*, within: Annotated[float, Gt(0)] = ANSWER_WITHIN) -> bool:
    """Whether the hub, or the proxy on the way to it, takes a connection.

    Args:
        within: Seconds to wait, the look-up of its name included.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    address = urlsplit(constants.ENDPOINT)
    if proxy := getproxies().get(address.scheme):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (80 if address.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection((address.hostname, port), timeout=within):
                answered.set()
        except OSError:
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=connect, daemon=True).start()  # a look-up has no time limit of its own
    done.wait(within)
    return answered.is_set()


def snapshot(name: str, revision: str | None) -> tuple[Path, str]:
    """Fetch a model's files, or find those fetched earlier.

    Args:
        name: `owner/name`.
        revision: Branch, tag or commit; None is the default branch.

    Returns:
        The folder, and the commit that it holds.

    Raises:
        HubError: It has no such model, wants a licence accepted, or does not answer and none of it
            was fetched earlier.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    is_online = is_reachable()

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=not is_online,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_FILES),
                endpoint=constants.ENDPOINT,
            )
        )

    try:
        folder = fetch(*FILES)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(*FILES, *PICKLES)
    except GatedRepoError as error:
        raise HubError(
            "gated",
            f"accept the licence at {constants.ENDPOINT}/{name}, then run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError("not found, or private") from error
    except RevisionNotFoundError as error:
        raise HubError(f"has no revision {revision}") from error
    except HFValidationError as error:
        raise HubError("no such name is possible; names are written owner/name") from error
    except LocalEntryNotFoundError as error:
        raise HubError("does not answer" if is_online else "offline") from error
    except HfHubHTTPError as error:
        raise HubError(f"error: {str(error).partition(chr(10))[0]}") from error
    if not (folder / "config.json").is_file():
        raise HubError("has no config.json" if is_online else "offline")
    return folder, folder.name


def fetched(name: str) -> bool:
    """Whether a model's files were fetched earlier; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return False
    folder = Path(config).parent
    return any(path for glob in ("*.safetensors", *PICKLES) for path in folder.glob(glob))
