"""This process as a client of the loopback Hub, as if its environment had been set before huggingface_hub was imported."""

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, constants
from hub_fixtures import WRITER, RunningHub


def connect(patch: pytest.MonkeyPatch, hub: RunningHub, token: str | None = WRITER) -> HfApi:
    """Reach `hub` with `token` from here, until `patch` is undone; returns a client."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(hub.home / "hub"))
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    patch.setattr(transformers.utils.hub, "_hf_api", None)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
    return HfApi(endpoint=hub.url, token=token or False)
