"""Pictures by address: unguessable, their owner's, for a while, in bounded room."""

import re

import pytest

from tests.serve.nonce import NonceBackbone, Shown, ask, new_nonce, read_picture
from tests.serve.running import running
from weft.serve.files import ID_BYTES, Files, Own, address, is_address
from weft.serve.settings import ServeConfig


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_ids_cannot_be_guessed():
    files = Files(900, 2**20)
    ids = {files.put(b"", "a") for _ in range(2000)}
    assert len(ids) == 2000
    assert ID_BYTES * 8 >= 128
    assert {len(each) for each in ids} == {32}
    # 6 bits for each letter: each place takes all of 64
    assert all(len({each[i] for each in ids}) == 64 for i in range(32))


def test_pictures_are_kept_so_long_and_no_longer():
    clock = Clock()
    files = Files(900, 2**20, clock)
    first = files.put(b"first", "a")
    clock.now += 500
    second = files.put(b"second", "a")
    clock.now += 400
    assert files.get(first, "a") == b"first"
    clock.now += 0.1
    assert (files.get(first, "a"), files.get(second, "a")) == (None, b"second")
    clock.now += 900
    assert files.get(second, "a") is None
    assert files._bytes == len(files._files) == 0


def test_the_oldest_make_room():
    files = Files(900, 30)
    ids = [files.put(bytes(10), "a") for _ in range(3)]
    assert all(files.get(each, "a") for each in ids)
    ids.append(files.put(bytes(11), "a"))
    assert [files.get(each, "a") is not None for each in ids] == [False, False, True, True]


def test_a_picture_is_its_owners():
    files = Files(900, 2**20)
    identity = files.put(b"mine", "a")
    assert files.get(identity, "b") is None
    assert Own(files, "a").find(address(identity)) == b"mine"
    assert Own(files, "b").find(address(identity)) is None


@pytest.mark.parametrize("before", ["", "http://here:8000", "https://there.example"])
def test_an_address_is_known_whatever_host_a_client_puts_before_it(before):
    files = Files(900, 2**20)
    identity = files.put(b"mine", "a")
    assert is_address(before + address(identity))
    assert Own(files, "a").find(before + address(identity)) == b"mine"


TRICKS = [
    "", ".", "..", "../..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "..\\..", "%5c..%5c", "~root",
    "{id}", "*", "%00", "{}%00", "{}%20", "{}.png", "{}/..", "../files/{}", "./{}", "{}?x=/content", "%252e%252e",
    "\uff0e\uff0e", "\u2024\u2024", "C:", "file:", "con", "{}#", ";{}", "{};a", "{}%0d%0aX: y", "' OR 1=1", "$HOME",
    "a" * 5000, "-1", "0", "null", "None", "{}{}",
]  # fmt: skip


@pytest.fixture(scope="module")
def shared():
    with running({"nonce": NonceBackbone()}, keys=["mine", "theirs"]) as server:
        yield server


def made(server, key, nonce):
    asked = {"model": "nonce", "input": ask(nonce, "p"), "image_delivery": "url"}
    return server.http(key).post("/v1/responses", json=asked).json()["output"][0]["result"]


def test_a_picture_is_fetched_by_its_owner_alone(shared):
    at = made(shared, "mine", nonce := new_nonce())
    reply = shared.http("mine").get(at)
    assert read_picture(reply.content) == Shown(nonce, 0)
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "private" in reply.headers["cache-control"]
    assert shared.http("theirs").get(at).status_code == 404
    assert shared.http().get(at).status_code == 401
    assert shared.http("theirs").get(at).json()["error"]["code"] == "not_found"


def test_another_owners_picture_cannot_be_shown_to_the_model_either(shared):
    at = made(shared, "mine", new_nonce())
    for content in ([{"type": "input_image", "image_url": at}], f"see ![picture]({at})"):
        asked = {"model": "nonce", "input": [{"role": "user", "content": content}]}
        assert shared.http("mine").post("/v1/responses", json=asked).status_code == 200
        reply = shared.http("theirs").post("/v1/responses", json=asked)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "image")


@pytest.mark.parametrize("trick", TRICKS, ids=ascii)
def test_no_trick_with_a_path_finds_anything(shared, trick):
    at = made(shared, "mine", new_nonce())
    identity = at.split("/")[3]
    reply = shared.http("mine").get("/v1/files/" + trick.replace("{}", identity) + "/content")
    # some of these spellings are the address itself, once the client has resolved them
    if reply.request.url.raw_path.decode().partition("?")[0] == at:
        assert reply.status_code == 200
    else:
        assert reply.status_code in (404, 405), reply.request.url
        assert b"PNG" not in reply.content
        assert b"root:" not in reply.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_address_may_name_where_others_reach_it(stream):
    """And is known again when it comes back."""
    with running({"nonce": NonceBackbone()}, public_url="https://weft.example:8443") as server, server.http() as http:
        asked = {"model": "nonce", "input": ask(new_nonce(), "p"), "image_delivery": "url", "stream": stream}
        answer = http.post("/v1/responses", json=asked).text
        found = re.findall(r"https://weft\.example:8443(/v1/files/[\w-]{32}/content)", answer)
        assert found
        picture = http.get(found[0])
        assert picture.headers["content-type"] == "image/png"
        shown = {"type": "input_image", "image_url": f"https://weft.example:8443{found[0]}"}
        again = {"model": "nonce", "input": [{"role": "user", "content": [shown]}]}
        assert http.post("/v1/responses", json=again).status_code == 200


@pytest.mark.parametrize("wrong", ["weft.example", "https://a/b", "ftp://a", "https://a b", "javascript:1"])
def test_what_is_no_such_place_is_refused(wrong):
    with pytest.raises(ValueError, match="public_url"):
        ServeConfig(public_url=wrong)
