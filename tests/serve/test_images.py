"""`/v1/images/generations`: pictures alone."""

import base64

import pytest
from openai.types import ImagesResponse

from tests.serve.nonce import Shown, ask, new_nonce, read_picture


@pytest.mark.parametrize("n", [None, 1, 4])
def test_the_stock_client_gets_as_many_pictures_as_it_asks_for(nonce_server, n):
    nonce = new_nonce()
    found = nonce_server.openai().images.generate(model="nonce", prompt=ask(nonce, "p"), n=n)
    pictures = [base64.b64decode(image.b64_json) for image in found.data]
    assert [read_picture(data) for data in pictures] == [Shown(nonce, 0)] * (n or 1)


def test_pictures_come_by_address_where_that_is_asked_for(nonce_server):
    nonce, http = new_nonce(), nonce_server.http()
    for asked in ({"response_format": "url"}, {"image_delivery": "url"}):
        reply = http.post("/v1/images/generations", json={"model": "nonce", "prompt": ask(nonce, "p"), **asked})
        ImagesResponse.model_validate(reply.json())
        (image,) = reply.json()["data"]
        fetched = http.get(image["url"])
        assert fetched.headers["content-type"] == "image/png"
        assert read_picture(fetched.content) == Shown(nonce, 0)


def test_a_model_that_would_write_first_makes_its_picture_at_once(nonce_server):
    nonce = new_nonce()
    found = nonce_server.openai().images.generate(model="nonce", prompt=ask(nonce, "tttp"))
    assert read_picture(base64.b64decode(found.data[0].b64_json)) == Shown(nonce, 0)


def test_seeds_count_up(nano_server):
    """Picture i of a request is the picture of its seed + i."""
    client = nano_server.openai()

    def made(n, seed):
        extra = {"seed": seed}
        data = client.images.generate(model="nano", prompt="a cat", n=n, extra_body=extra).data
        return [image.b64_json for image in data]

    assert made(3, 5) == [*made(1, 5), *made(1, 6), *made(1, 7)]
    assert len(set(made(4, 5))) > 1


@pytest.mark.parametrize("size, status", [("16x16", 200), ("auto", 200), ("17x16", 400), ("large", 400), ("0x16", 400)])
def test_sizes_are_those_of_the_model(nano_server, size, status):
    for name in ("size", "image_size"):
        asked = {"model": "nano", "prompt": "a", name: size}
        assert nano_server.http().post("/v1/images/generations", json=asked).status_code == status


@pytest.mark.parametrize(
    "field, value", [("n", 0), ("n", 5), ("prompt", ""), ("stream", True), ("quality", "hd"), ("mask", "x")]
)
def test_what_cannot_be_done_is_refused_by_name(nano_server, field, value):
    asked = {"model": "nano", "prompt": "a", field: value}
    reply = nano_server.http().post("/v1/images/generations", json=asked)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
