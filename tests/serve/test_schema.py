"""What the server says that it takes, it takes; whatever it is sent, it does not fail."""

import contextlib
import json

import httpx2
import pytest

from tests.serve.nonce import NonceBackbone
from tests.serve.running import running
from weft.serve.limits import Limits
from weft.serve.schema import Asked, ChatRequest, Extras, ImagesRequest, ResponsesRequest

JSON = {"content-type": "application/json"}


def test_the_page_of_addresses_names_all_of_them(nonce_server):
    spec = nonce_server.http().get("/openapi.json").json()
    assert {
        "/v1/responses", "/v1/chat/completions", "/v1/images/generations", "/v1/models", "/v1/models/{name}",
        "/v1/files/{identity}/content", "/health", "/ready", "/metrics",
    } <= spec["paths"].keys()  # fmt: skip
    for request in (ChatRequest, ResponsesRequest, ImagesRequest):
        described = spec["components"]["schemas"][request.__name__]
        assert described["properties"].keys() == request.model_fields.keys()
        assert described["additionalProperties"] is False
    assert issubclass(Asked, Extras)


MALFORMED = {
    "nothing": b"",
    "no JSON": b"hello",
    "half": b'{"model": "nonce", "input": ',
    "trailing": b'{"model": "nonce", "input": "a"} {}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"17",
    "no UTF-8": b'{"model": "nonce", "input": "\xff\xfe"}',
    "UTF-16": '{"model": "nonce", "input": "a"}'.encode("utf-16"),
    "NaN": b'{"model": "nonce", "input": "a", "temperature": NaN}',
    "infinity": b'{"model": "nonce", "input": "a", "top_p": Infinity, "cfg_scale": -Infinity}',
    "digits": b'{"model": "nonce", "input": "a", "seed": ' + b"9" * 5000 + b"}",
    "exponent": b'{"model": "nonce", "input": "a", "seed": 1e999}',
    "a large number": b'{"model": "nonce", "input": "a", "max_images": 100000000000000000000000000}',
    "a surrogate": b'{"model": "nonce", "input": "\\ud800"}',
    "surrogates all over": b'{"model": "\\ud800", "input": "a", "user": "\\udfff", "metadata": {"\\ud800": "\\ud800"}}',
    "a name that is none": b'{"model": "nonce", "input": "a", "\\ud800": 1}',
    "a nested name that is none": b'{"model": "nonce", "input": "a", "extra_body": {"\\ud800": 1}}',
    "a long name": b'{"model": "nonce", "input": "a", "' + b"x" * 100_000 + b'": 1}',
    "wrong types": b'{"model": 5, "input": 5, "stream": "maybe", "seed": [], "extra_body": 5, "tools": {}}',
    "nested types": b'{"model": "nonce", "input": "a", "extra_body": {"max_images": "b", "min_images": []}}',
    "deep": b'{"model": "nonce", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "many": b'{"model": "nonce", "input": [' + b"1," * 100_000 + b"1]}",
    "a name twice": b'{"model": "nonce", "model": 5, "input": "a"}',
    "NUL": b"\0" * 100,
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "items": b'{"model": "nonce", "input": [null, 5, "a", []]}',
    "tools": b'{"model": "nonce", "input": "a", "tools": [{"type": "image_generation", "size": "64x64"}]}',
    "no model": b'{"model": "other", "input": "a"}',
    "streamed": b'{"model": "nonce", "input": [{"role": "owner", "content": "a"}], "stream": true}',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bodies_are_refused_in_the_form_of_openai(nonce_server, name):
    for path in ("responses", "chat/completions", "images/generations"):
        body = MALFORMED[name]
        reply = nonce_server.http().post(f"/v1/{path}", content=body, headers=JSON)
        assert reply.status_code in (400, 404), (path, reply.status_code)
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert len(reply.content) < 1000
    assert nonce_server.http().get("/health").json() == {"status": "ok"}


def test_other_ways_to_ask_are_refused(nonce_server):
    http = nonce_server.http()
    body = b'{"model": "nonce", "input": "a"}'
    for headers in ({"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=a"}, {}):
        assert http.post("/v1/responses", content=body, headers=headers).status_code == 400
    assert http.post("/v1/nothing", content=body, headers=JSON).json()["error"]["code"] == "not_found"
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        reply = http.request(method, "/v1/responses", content=body, headers=JSON)
        assert (reply.status_code, reply.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_body_that_is_too_long_hears_so_and_one_that_does_not_end_is_cut():
    with running({"nonce": NonceBackbone()}, limits=Limits(body_bytes=2**20)) as server:
        body = json.dumps({"model": "nonce", "input": "a" * 2**20}).encode()
        reply = server.http().post("/v1/responses", content=body, headers=JSON)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")

        sent = 0

        def endless():
            nonlocal sent
            while True:
                sent += 2**16
                yield b"a" * 2**16

        with contextlib.suppress(httpx2.TransportError):  # cut off while it still writes
            assert server.http().post("/v1/responses", content=endless(), headers=JSON).status_code == 413
        # what fits into the buffers between them goes further
        assert sent < 30 * 2**20
        assert server.http().get("/health").status_code == 200


def fuzz(server, examples):
    """Requests that schemathesis makes of the schema, good ones and bad ones; returns how many of each status."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = {}
    chosen = [operation.ok() for operation in schema.get_all_operations()]
    chosen = [operation for operation in chosen if operation.path.startswith(("/v1/", "/health", "/ready", "/metrics"))]
    assert len(chosen) == 9
    good, bad = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    for operation in chosen:
        # nothing can be wrong where nothing is sent
        for mode in (good, bad) if operation.method.upper() == "POST" else (good,):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def ask(case):
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "nonce"  # nobody guesses it
                reply = case.call()
                found[reply.status_code] = found.get(reply.status_code, 0) + 1
                assert reply.status_code < 500, (case.method, case.path, case.body, reply.text)

            ask()
    return found


@pytest.mark.slow
def test_nothing_that_the_schema_allows_or_forbids_makes_it_fail():
    with running({"nonce": NonceBackbone()}, context=512) as server:
        found = fuzz(server, 60)
        print(found)
        assert found[200] > 50
        assert found[400] > 50
        assert server.http().get("/health").json() == {"status": "ok"}
