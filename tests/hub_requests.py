"""Who asks the loopback Hub, and for what: the checked parts of a request."""

import base64
import binascii
import json
from dataclasses import dataclass
from urllib.parse import unquote

from hub_store import HubError
from starlette.requests import Request


@dataclass(frozen=True)
class Account:
    """Whose token it is, and whether it may write; users write in the namespace of their own name only."""

    name: str
    role: str  # "write" or "read"


TOKENS = {
    "hf_loopback_writer": Account("karla", "write"),
    "hf_loopback_reader": Account("karla", "read"),
    "hf_loopback_stranger": Account("stranger", "write"),
}


def account_of(request: Request) -> Account | None:
    """Who asks; `None` without a token, 401 with one that nobody has."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    if account := TOKENS.get(header.removeprefix("Bearer ")):
        return account
    raise HubError(401, "Invalid credentials in Authorization header")


def writer_of(request: Request, namespace: str | None = None) -> Account:
    """Who asks, if they may write in the namespace (by default their own)."""
    account = account_of(request)
    if account is None:
        code = "RepoNotFound" if "namespace" in request.path_params else ""
        raise HubError(401, "Invalid username or password.", code)
    if account.role != "write" or namespace not in (None, account.name):
        raise HubError(
            403, f"The {account.role} token of {account.name} may not write to {namespace or account.name!r}"
        )
    return account


def parameter(request: Request, name: str, default: str = "") -> str:
    return unquote(request.path_params.get(name, default))


def field(data, name: str, kind: type = str):
    """A required field of a JSON object, of the right type."""
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HubError(400, f"The request needs {name!r} of type {kind.__name__}, got {value!r:.100}.")
    return value


def parse(body: bytes) -> dict:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HubError(400, f"The request is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise HubError(400, f"The request must be a JSON object, got {data!r:.100}.")
    return data


def decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise HubError(400, f"The content is not base64: {error}") from None
