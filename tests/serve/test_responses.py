"""`/v1/responses`: what the stock client reads, whole and streamed, and what it may send back."""

import json
import threading
import time

import pytest
import torch
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.serve.nonce import PATCHES, NonceBackbone, Shown, ask, digest_of, expected, new_nonce, picture
from tests.serve.reading import of_response, shown
from tests.serve.running import running, until
from weft.backbones.base import encode_document
from weft.document import Document, Image, Text, Turn, assistant, user
from weft.serve.limits import Limits

EVENT = TypeAdapter(ResponseStreamEvent)
PLANS = ["t", "p", "tptp", "pp", "tppt", "pptpp"]
LINE = 64 * 1024


def whole(server, **asked):
    """Checked against the types of the stock client, which itself reads anything."""
    reply = server.http().post("/v1/responses", json={"model": "nonce", **asked})
    assert reply.status_code == 200, reply.text
    Response.model_validate(reply.json())
    return reply.json()


def events_of(server, **asked):
    with server.openai().responses.create(model="nonce", stream=True, **asked) as stream:
        found = [event.model_dump(mode="json", exclude_unset=True) for event in stream]
    for event in found:
        EVENT.validate_python(event)
    return found


def fetching(server):
    return lambda address: server.http().get(address).raise_for_status().content


def without_chance(answer):
    """An answer without what two of the same request differ in."""
    text = json.dumps(answer).replace(answer["id"].removeprefix("resp_"), "ID")
    return {**json.loads(text), "created_at": 0}


@pytest.mark.parametrize("plan", PLANS)
def test_the_stock_client_reads_texts_and_pictures_in_order(nonce_server, plan):
    nonce = new_nonce()
    found = nonce_server.openai().responses.create(model="nonce", input=ask(nonce, plan))
    parts = shown(of_response(found.model_dump(mode="json"), fetching(nonce_server)))
    assert parts == expected(nonce, plan)
    assert found.output_text == "".join(part for part in parts if isinstance(part, str))
    assert (found.status, found.error, found.incomplete_details) == ("completed", None, None)
    assert whole(nonce_server, input=ask(nonce, plan))["model"] == "nonce"


@pytest.mark.parametrize("delivery", ["inline", "url"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_stream_is_the_answer_in_pieces(nonce_server, plan, delivery):
    asked = {"input": ask(new_nonce(), plan)}
    events = events_of(nonce_server, **asked, extra_body={"image_delivery": delivery})
    kinds = [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    last = events[-1]["response"]
    # every item is opened, filled and closed before the next one, in the order of the output
    opened = [e["output_index"] for e in events if e["type"] == "response.output_item.added"]
    closed = [e["output_index"] for e in events if e["type"] == "response.output_item.done"]
    assert opened == closed == list(range(len(last["output"])))
    indices = [event["output_index"] for event in events if "output_index" in event]
    assert indices == sorted(indices)
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == last["output"]
    for place, item in enumerate(last["output"]):
        deltas = [e["delta"] for e in events if e["type"].endswith("text.delta") and e["output_index"] == place]
        texts = [part["text"] for part in item.get("content", ())]
        assert "".join(deltas) == "".join(texts)
        assert all(e["item_id"] == item["id"] for e in events if "item_id" in e and e["output_index"] == place)
        if item["type"] == "image_generation_call":
            steps = [e["type"].rpartition(".")[2] for e in events if e.get("item_id") == item["id"]]
            assert steps == ["in_progress", "generating", "completed"]
    alone = whole(nonce_server, **asked)
    assert of_response(last, fetching(nonce_server)) == of_response(alone, fetching(nonce_server))
    if delivery == "inline":
        assert without_chance(last) == without_chance(alone)


def same_streamed(server, seeds):
    """For each seed: one random answer, whole and streamed; returns the different answers."""
    client, found = server.openai(), []
    for seed in seeds:
        asked = {"model": "nano", "input": f"story {seed}", "max_output_tokens": 24, "temperature": 1.5}
        extra = {"seed": seed, "min_images": seed % 3}
        alone = client.responses.create(**asked, extra_body=extra).model_dump(mode="json")
        with client.responses.create(**asked, stream=True, extra_body=extra) as stream:
            *_, last = (event.model_dump(mode="json") for event in stream)
        fetch = fetching(server)
        assert of_response(last["response"], fetch) == of_response(alone, fetch)
        assert last["response"]["status"] == alone["status"]
        assert last["response"]["usage"] == alone["usage"]
        found.append(str(of_response(alone, fetch)))
    return set(found)


def test_streamed_and_whole_are_the_same_bytes_for_every_seed(nano_server):
    assert len(same_streamed(nano_server, range(5))) == 5


@pytest.mark.slow
def test_streamed_and_whole_are_the_same_bytes_for_200_seeds(nano_server):
    assert len(same_streamed(nano_server, range(200))) == 200


def own_digest(*turns):
    return digest_of(encode_document(NonceBackbone(), Document(tuple(turns)), answer=True).ids.tolist())


def as_document(parts):
    return [Image(part) if isinstance(part, bytes) else part for part in parts]


@pytest.mark.parametrize("delivery", ["inline", "url"])
@pytest.mark.parametrize("streamed", [False, True])
def test_answers_are_history_in_every_shape_they_come_in(nonce_server, delivery, streamed):
    first, second = ask(new_nonce(), "tpptp"), ask(nonce := new_nonce(), "sdp")
    extra = {"image_delivery": delivery}
    if streamed:
        answer = events_of(nonce_server, input=first, extra_body=extra)[-1]["response"]
    else:
        answer = whole(nonce_server, input=first, **extra)
    parts = of_response(answer, fetching(nonce_server))
    turns = [{"role": "user", "content": first}, *answer["output"], {"role": "user", "content": second}]
    again = whole(nonce_server, input=turns, instructions="be brief")
    digest = own_digest(Turn("system", (Text("be brief"),)), user(first), assistant(*as_document(parts)), user(second))
    seen = [part for part in shown(parts) if isinstance(part, Shown)]
    assert len(seen) == 3
    assert shown(of_response(again, fetching(nonce_server))) == expected(nonce, "sdp", seen, digest)
    # as parts of a message too, in the forms that OpenAI knows
    if delivery == "inline":
        content = [
            {"type": "output_text", "text": item["content"][0]["text"]}
            if item["type"] == "message"
            else {"type": "input_image", "detail": "auto", "image_url": f"data:image/png;base64,{item['result']}"}
            for item in answer["output"]
        ]
        turns = [turns[0], {"type": "message", "role": "assistant", "content": content}, turns[-1]]
        third = whole(nonce_server, input=turns, instructions="be brief")
        assert of_response(third, fetching(nonce_server)) == of_response(again, fetching(nonce_server))


def test_pictures_are_read_in_both_forms_of_a_part(nonce_server):
    shows = [Shown(new_nonce(), number) for number in range(4)]
    urls = [f"data:image/png;base64,{base64_of(each)}" for each in shows]
    content = [{"type": "input_text", "text": ask(nonce := new_nonce(), "s")}]
    content += [{"type": "input_image", "image_url": url} for url in urls[:2]]
    content += [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls[2:]]
    answer = whole(nonce_server, input=[{"role": "user", "content": content}])
    assert shown(of_response(answer, fetching(nonce_server))) == expected(nonce, "s", shows)


def base64_of(each):
    import base64

    return base64.b64encode(picture(each)).decode()


def test_what_an_answer_used_is_counted(nonce_server):
    asked, nonce = ask(new_nonce(), "tptp"), 17
    usage = whole(nonce_server, input=asked)["usage"]
    texts, images = 2 * nonce, 2 * PATCHES
    assert usage["input_tokens"] == len(asked) + 2
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0, "text_tokens": texts, "image_tokens": images}
    assert usage["output_tokens"] == texts + images
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize(
    "budget, parts",
    [(10, [9]), (17 + PATCHES + 2, [17]), (17 + PATCHES + 3, [17, None]), (17 + PATCHES + 8, [17, None, 5])],
)
def test_a_budget_ends_an_answer_as_incomplete_and_never_inside_a_picture(nonce_server, budget, parts):
    asked = {"input": ask(nonce := new_nonce(), "tptp"), "max_output_tokens": budget}
    answer = whole(nonce_server, **asked)
    found = shown(of_response(answer, fetching(nonce_server)))
    assert [len(part) if isinstance(part, str) else None for part in found] == parts
    assert found == [
        part if length is None else part[:length] for part, length in zip(expected(nonce, "tptp"), parts, strict=False)
    ]
    last = events_of(nonce_server, **asked, extra_body={"image_delivery": "inline"})[-1]
    assert last["type"].removeprefix("response.") == last["response"]["status"] == answer["status"]
    assert without_chance(last["response"]) == without_chance(answer)
    if isinstance(found[-1], str) and len(found[-1]) < 17:  # after whole parts, this model ends by itself
        assert answer["status"] == answer["output"][-1]["status"] == "incomplete"
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.fixture(scope="module")
def large():
    """A server whose pictures are larger than a line may be."""
    with running({"nonce": NonceBackbone(side=240)}) as server:
        yield server


def stream_of(server, path, **asked):
    with server.http().stream("POST", path, json={"model": "nonce", "stream": True, **asked}) as reply:
        assert reply.status_code == 200
        return b"".join(reply.iter_bytes())


def test_no_line_of_a_stream_is_longer_than_clients_read(large):
    asked = {
        "input": ask(new_nonce(), "tpppp"),
        "instructions": "ü" * 1500,
        "metadata": {f"{i:064}": "\U0001f600" * 512 for i in range(16)},
        "user": "\u2028" * 512,  # a line for some, not for others
    }
    sent = stream_of(large, "/v1/responses", **asked)
    assert max(map(len, sent.split(b"\n\n"))) > LINE > max(map(len, sent.split(b"\n")))
    with large.openai().responses.create(model="nonce", stream=True, **asked) as stream:
        *_, last = stream
    # what stood in many lines is read as one
    assert last.response.metadata == asked["metadata"]
    assert last.response.instructions == asked["instructions"]
    # whoever asks for them inline gets them so
    sent = stream_of(large, "/v1/responses", input=asked["input"], image_delivery="inline")
    assert max(map(len, sent.split(b"\n"))) > LINE


def test_long_instructions_do_not_come_back(nonce_server):
    for length, echoed in ((8192, True), (8193, False)):
        answer = whole(nonce_server, input="a", instructions="b" * length)
        assert answer["instructions"] == ("b" * length if echoed else None)


def test_a_stream_that_has_nothing_to_say_says_so():
    go, steps = threading.Event(), 0

    def wait():
        nonlocal steps
        steps += 1
        if steps == 12:
            assert go.wait(60)

    with running({"nonce": NonceBackbone(before_step=wait)}, limits=Limits(keep_alive_seconds=1)) as server:
        asked = {"model": "nonce", "stream": True, "input": ask(new_nonce(), "tp")}
        with server.http().stream("POST", "/v1/responses", json=asked) as reply:
            said = ""
            for line in reply.iter_lines():
                said = said or (line if line.startswith(":") else "")
                if said:
                    go.set()
        assert said.startswith(": ping")
        assert go.is_set()


@pytest.mark.parametrize("endpoint", ["responses", pytest.param("chat/completions", marks=pytest.mark.slow)])
def test_a_stream_begins_before_its_answer_does(endpoint):
    """Whoever waits for a slot hears from the server; what is refused later is refused in the stream."""
    go = threading.Event()
    limits = Limits(keep_alive_seconds=1, queue_seconds=3)
    with running({"nonce": NonceBackbone(before_step=lambda: go.wait(60))}, slots=1, limits=limits) as server:
        blocking = threading.Thread(target=whole, args=(server,), kwargs={"input": "a"})
        blocking.start()
        until(lambda: server.scheduler.load.running == 1)
        prompt = {"input": "a"} if endpoint == "responses" else {"messages": [{"role": "user", "content": "a"}]}
        asked = {"model": "nonce", "stream": True, **prompt}
        with server.http().stream("POST", f"/v1/{endpoint}", json=asked) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            first = next(lines)
            assert server.scheduler.load.waiting == 1
            time.sleep(limits.queue_seconds)  # it waits too long meanwhile
            go.set()
            data = [line for line in [first, *lines] if line.startswith("data: ")]
        assert "no slot became free" in data[-1]
        assert len(data) == (3 if endpoint == "responses" else 2)
        blocking.join(60)
        # one that is refused at once has a status that says so
        server.scheduler._is_closing = True
        assert server.http().post(f"/v1/{endpoint}", json=asked).status_code == 503


def test_an_answer_that_breaks_ends_with_an_error(monkeypatch):
    model = NonceBackbone()
    real = model.text_logits
    with running({"nonce": model}) as server:
        # the first letters are good, then there is no number
        monkeypatch.setattr(model, "text_logits", lambda hidden: real(hidden) * (1 if next(good, None) else torch.nan))
        good = iter([1] * 5)
        events = events_of(server, input=ask(new_nonce(), "tp"))
        last = events[-1]["response"]
        assert (events[-1]["type"], last["status"], last["error"]["code"]) == (
            "response.failed", "failed", "server_error",
        )  # fmt: skip
        good = iter([1] * 5)
        reply = server.http().post("/v1/responses", json={"model": "nonce", "input": ask(new_nonce(), "tp")})
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")


def test_a_model_that_stops_working_ends_streams_with_an_error():
    steps = iter(range(8))

    def fail():
        if next(steps, None) is None:
            raise RuntimeError("of the model")

    with running({"nonce": NonceBackbone(before_step=fail)}) as server:
        events = events_of(server, input=ask(new_nonce(), "tp"))
        assert events[-1]["type"] == "response.failed"
        assert "of the model" not in json.dumps(events)
        assert server.http().get("/health").status_code == 500
        reply = server.http().post("/v1/responses", json={"model": "nonce", "input": "more"})
        assert reply.status_code == 500
