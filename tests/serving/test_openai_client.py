"""OpenAI's own client gets what it is used to."""

from __future__ import annotations

import pytest
from support.serving import server_process

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    environment = {"MUSE_API_KEY": "secret"}
    with (
        server_process(folder, run_folder, "--name", "small", engine={}, environment=environment) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="secret", max_retries=0) as client,
    ):
        yield client


@pytest.mark.slow
def test_the_client_completes_streams_and_lists(client):
    (model,) = client.models.list()
    asked = {"model": model.id, "prompt": "Line 7", "max_tokens": 6, "seed": 3, "logprobs": 2, "n": 2}
    whole = client.completions.create(**asked)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.top_logprobs) == 6
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.slow
def test_the_client_knows_the_errors(client):
    def ask(**body):
        return client.completions.create(**{"model": "small", "prompt": "Line", **body})

    with pytest.raises(openai.BadRequestError) as refused:
        ask(max_tokens=1000)
    assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="no field 'top_n'; the nearest is top_"):
        ask(extra_body={"top_n": 3})
    with pytest.raises(openai.NotFoundError):
        ask(model="large")
    with pytest.raises(openai.InternalServerError):
        ask(prompt=[7, 8])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
