from __future__ import annotations

import asyncio

import httpx
import pytest
import torch
from support.serving import FakeEngine
from support.trained import make_trained

import muse
from muse.serving.app import create_app
from muse.serving.served import served
from muse.serving.service import Limits, Service


@pytest.fixture(autouse=True)
def engine_thread():
    """What a server has: one thread for the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("served"), seq_len=64)[0]


@pytest.fixture(scope="session")
def model(run_folder):
    return served(muse.load(run_folder), "small")


class Server:
    """An application, its engine, and clients of it that need no network."""

    def __init__(self, model, keys=(), limits=None, **engine):
        self.engine = FakeEngine(model.tokenizer, **engine)
        self.limits = limits or Limits(self.engine.slots, self.engine.queue)
        self.service = Service(self.engine, model, self.limits, keys)
        self.app = create_app(self.service)
        self.engine.start()

    def client(self, **headers):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://there", headers=headers, timeout=None)

    async def post(self, path, body, **headers):
        async with self.client(**headers) as client:
            return await client.post(path, json=body)

    async def post_raw(self, path, content, **headers):
        async with self.client(**{"content-type": "application/json", **headers}) as client:
            return await client.post(path, content=content)

    async def get(self, path, **headers):
        async with self.client(**headers) as client:
            return await client.get(path)


@pytest.fixture
def server(model):
    """Builds servers, whose engines end with the test."""
    made = []

    def build(**options):
        made.append(Server(model, **options))
        return made[-1]

    yield build
    for one in made:
        one.engine.stop()


@pytest.fixture
def wait():
    """Runs a coroutine to its end."""
    return asyncio.run
