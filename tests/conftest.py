"""What holds for every test: no network, one thread, fixed seeds, and NaN in memory that nobody has written."""

import os
import random
import socket
import sys


# Read by huggingface_hub, datasets and matplotlib when they are imported, and inherited by subprocesses.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
import torch
from hub_fixtures import loopback_hub  # noqa: F401 - a fixture for all tests
from hypothesis import settings


LOCAL_HOSTS = {None, "", "localhost", "::1", "0.0.0.0", socket.gethostname()}


def refuse_network(event: str, arguments: tuple) -> None:
    """Audit hook: raise for a look-up of, or a connection to, anything but this machine."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL_HOSTS and not host.startswith("127."):
        raise RuntimeError(f"A test asked for the network host {host!r}; tests reach only this machine.")


sys.addaudithook(refuse_network)

torch.set_num_threads(1)
# Deterministic mode fills torch.empty and its relatives with NaN (integers with their largest value): a result that
# rests on memory nobody wrote is then wrong every time, not once in a while.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

NORMAL = torch.nn.init.normal_

settings.register_profile("karla", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=300)  # other cases in every run, and more of them
settings.load_profile("karla")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Give each test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    # transformers replaces torch's initialisers while it loads a model; two threads that load at once leave them replaced
    assert torch.nn.init.normal_ is NORMAL


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items):
    """Keep the tests of a file, and all of the fuzz suite, in one process of pytest-xdist: they share what was made for them."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("fuzz" if "fuzz" in item.path.parts else str(item.path)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
