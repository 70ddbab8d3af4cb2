"""`/v1/chat/completions`: three renderings of one answer, and all of them accepted back."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.serve.nonce import PATCHES, NonceBackbone, Shown, ask, digest_of, expected, new_nonce
from tests.serve.reading import of_message, of_response, shown
from tests.serve.running import running
from weft.backbones.base import encode_document
from weft.document import Document, Image, assistant, user

FORMS = ["images", "parts", "markdown"]
PLANS = ["t", "p", "tptp", "pp", "tppt"]
LINE = 64 * 1024
# where OpenAI has a string, parts are a list
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


def post(server, **asked):
    reply = server.http().post("/v1/chat/completions", json={"model": "nonce", **asked})
    assert reply.status_code == 200, reply.text
    return reply.json()


def whole(server, prompt, form="images", **asked):
    answer = post(server, messages=[{"role": "user", "content": prompt}], response_image_format=form, **asked)
    if form != "parts":  # a list where OpenAI has a string
        ChatCompletion.model_validate(answer)
    return answer


def chunks_of(server, prompt, form="images", **asked):
    extra = {"response_image_format": form, **asked.pop("extra_body", {})}
    messages = [{"role": "user", "content": prompt}]
    with server.openai().chat.completions.create(
        model="nonce", messages=messages, stream=True, extra_body=extra, **asked
    ) as stream:
        found = [chunk.model_dump(mode="json", exclude_unset=True) for chunk in stream]
    for chunk in found:
        if form != "parts":
            ChatCompletionChunk.model_validate(chunk)
    return found


def put_together(chunks):
    """A message from its deltas, as clients do it."""
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    contents = [delta["content"] for delta in deltas if delta.get("content")]
    if contents and isinstance(contents[0], list):
        parts = []
        for part in (part for content in contents for part in content):
            if parts and part["type"] == parts[-1]["type"] == "text":
                parts[-1]["text"] += part["text"]
            else:
                parts.append(dict(part))
        return {"content": parts}
    pictures = [picture for delta in deltas for picture in delta.get("images", ())]
    return {"content": "".join(contents), **({"images": pictures} if pictures else {})}


def fetching(server):
    return lambda address: server.http().get(address).raise_for_status().content


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_all_renderings_tell_texts_and_pictures_in_order(nonce_server, plan, form):
    prompt = ask(nonce := new_nonce(), plan)
    fetch = fetching(nonce_server)
    answer = whole(nonce_server, prompt, form)
    message = answer["choices"][0]["message"]
    parts = of_message(message, fetch)
    assert shown(parts) == expected(nonce, plan)
    assert answer["choices"][0]["finish_reason"] == "stop"
    # the stock client reads it
    extra = {"response_image_format": form}
    messages = [{"role": "user", "content": prompt}]
    read = nonce_server.openai().chat.completions.create(model="nonce", messages=messages, extra_body=extra)
    if form != "markdown":  # where addresses differ
        assert read.choices[0].message.model_dump(exclude_unset=True) == message
    # the same as Responses says it
    other = nonce_server.http().post("/v1/responses", json={"model": "nonce", "input": prompt}).json()
    assert of_response(other, fetch) == parts


@pytest.mark.parametrize("delivery", ["inline", "url"])
@pytest.mark.parametrize("form", FORMS)
def test_a_stream_is_the_answer_in_pieces(nonce_server, form, delivery):
    prompt, fetch = ask(new_nonce(), "tpptp"), fetching(nonce_server)
    chunks = chunks_of(
        nonce_server, prompt, form, extra_body={"image_delivery": delivery}, stream_options={"include_usage": True}
    )
    alone = whole(nonce_server, prompt, form, image_delivery=delivery)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert [chunk["usage"] for chunk in chunks if not chunk["choices"]] == [alone["usage"]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    message = alone["choices"][0]["message"]
    together = put_together(chunks)
    assert of_message(together, fetch) == of_message(message, fetch)
    if delivery == "inline" and form != "markdown":
        assert together.get("images") == message.get("images")
        assert together["content"] == message["content"]


def test_a_stream_ends_with_its_mark(nonce_server):
    asked = {"model": "nonce", "messages": [{"role": "user", "content": ask(new_nonce(), "t")}], "stream": True}
    lines = [line for line in nonce_server.http().post("/v1/chat/completions", json=asked).text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    # no usage unless it is asked for
    assert "usage" not in "".join(lines)


def test_no_line_is_longer_than_clients_read_unless_pictures_are_asked_for_in_it():
    with running({"nonce": NonceBackbone(side=240)}) as server:
        for form in FORMS:
            asked = {"messages": [{"role": "user", "content": ask(new_nonce(), "tpp")}], "model": "nonce"}
            asked |= {"stream": True, "response_image_format": form}
            for delivery in (None, "inline"):
                text = server.http().post("/v1/chat/completions", json={**asked, "image_delivery": delivery}).text
                longest = max(map(len, text.split("\n")))
                assert (longest > LINE) == (delivery == "inline" and form != "markdown")
                if longest <= LINE:
                    assert longest < 2000


def own_digest(*turns):
    return digest_of(encode_document(NonceBackbone(), Document(tuple(turns)), answer=True).ids.tolist())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("delivery", ["inline", "url"])
@pytest.mark.parametrize("streamed", [False, True])
def test_answers_are_history_in_every_shape_they_come_in(nonce_server, form, delivery, streamed):
    first, second = ask(new_nonce(), "tpptp"), ask(nonce := new_nonce(), "sd")
    fetch = fetching(nonce_server)
    if streamed:
        message = put_together(chunks_of(nonce_server, first, form, extra_body={"image_delivery": delivery}))
        message["role"] = "assistant"
    else:
        message = whole(nonce_server, first, form, image_delivery=delivery)["choices"][0]["message"]
        # as the stock client writes it down again, with all that it knows of
        message |= {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    parts = of_message(message, fetch)
    messages = [{"role": "user", "content": first}, message, {"role": "user", "content": second}]
    again = post(nonce_server, messages=messages)["choices"][0]["message"]
    pictures = [Image(part) if isinstance(part, bytes) else part for part in parts]
    digest = own_digest(user(first), assistant(*pictures), user(second))
    seen = [part for part in shown(parts) if isinstance(part, Shown)]
    assert len(seen) == 3
    assert shown(of_message(again, fetch)) == expected(nonce, "sd", seen, digest)


def test_the_client_that_sends_its_own_objects_back_is_understood(nonce_server):
    client, first, second = nonce_server.openai(), ask(new_nonce(), "tp"), ask(nonce := new_nonce(), "s")
    messages = [{"role": "user", "content": first}]
    answer = client.chat.completions.create(model="nonce", messages=messages)
    message = answer.choices[0].message
    again = client.chat.completions.create(
        model="nonce", messages=[*messages, message, {"role": "user", "content": second}]
    )
    seen = [part for part in shown(of_message(message.model_dump(), fetching(nonce_server))) if isinstance(part, Shown)]
    assert again.choices[0].message.content == expected(nonce, "s", seen)[0]


def test_what_an_answer_used_is_counted(nonce_server):
    prompt = ask(new_nonce(), "tptp")
    usage = whole(nonce_server, prompt)["usage"]
    assert usage["prompt_tokens"] == len(prompt) + 2
    assert usage["completion_tokens_details"] == {
        "text_tokens": 34, "image_tokens": 2 * PATCHES, "reasoning_tokens": 0,
    }  # fmt: skip
    assert usage["completion_tokens"] == 34 + 2 * PATCHES
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_budget_cuts_an_answer_off(nonce_server, name):
    prompt = ask(nonce := new_nonce(), "tp")
    answer = whole(nonce_server, prompt, **{name: 10})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == nonce[:9]
    chunks = chunks_of(nonce_server, prompt, **{name: 10})
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_an_answer_may_be_kept_to_text(nonce_server):
    prompt = ask(nonce := new_nonce(), "tp")
    for asked in ({"modalities": ["text"]}, {"max_images": 0}, {"extra_body": {"max_images": 0}}):
        message = whole(nonce_server, prompt, **asked)["choices"][0]["message"]
        assert (message["content"], message["images"]) == (f"{nonce} ", [])
    assert whole(nonce_server, prompt, modalities=["text", "image"])["choices"][0]["message"]["images"]


NEUTRAL = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "logit_bias": {}, "stop": [], "tools": [],
    "tool_choice": "auto", "response_format": {"type": "text"}, "n": 1, "stream": False, "store": False,
    "user": "somebody", "metadata": {"a": "b"}, "seed": 3, "temperature": 1, "top_p": 0.5, "service_tier": "auto",
}  # fmt: skip
UNHEEDED = {
    "frequency_penalty": 0.5, "presence_penalty": -1, "logprobs": True, "logit_bias": {"5": 1}, "stop": ["a"],
    "tools": [{"type": "function"}], "tool_choice": "required", "response_format": {"type": "json_object"}, "n": 2,
    "store": True, "top_k": 5, "best_of": 2, "max_picture": 3, "temperature": 3, "top_p": 0, "seed": -1,
    "max_images": -1, "image_size": "large", "image_delivery": "mail", "response_image_format": "pdf",
    "modalities": ["audio"], "max_tokens": 0, "cfg_scale": -1, "num_inference_steps": 0, "user": "a" * 513,
    "metadata": {"a": "b" * 513}, "stream_options": {"other": True},
}  # fmt: skip


def test_fields_that_change_nothing_are_accepted(nonce_server):
    whole(nonce_server, ask(new_nonce(), "t"), **NEUTRAL)
    whole(nonce_server, ask(new_nonce(), "t"), **dict.fromkeys(NEUTRAL))


@pytest.mark.parametrize("name", UNHEEDED)
def test_fields_that_cannot_be_heeded_are_refused_by_name(nonce_server, name):
    asked = {"model": "nonce", "messages": [{"role": "user", "content": "a"}], name: UNHEEDED[name]}
    reply = nonce_server.http().post("/v1/chat/completions", json=asked)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition(".")[0] == name
    if name not in ("best_of", "max_picture", "top_k"):
        nested = {**asked, "extra_body": {name: asked.pop(name)}}
        assert nonce_server.http().post("/v1/chat/completions", json=nested).status_code == 400


def test_an_answer_that_breaks_is_an_error_and_none_that_is_filtered(monkeypatch):
    model = NonceBackbone()
    with running({"nonce": model}) as server:
        monkeypatch.setattr(model, "text_logits", lambda hidden: hidden.new_full((*hidden.shape[:-1], 262), torch_nan))
        asked = {"model": "nonce", "messages": [{"role": "user", "content": "a"}]}
        reply = server.http().post("/v1/chat/completions", json=asked)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "broken_answer")


def test_a_stream_that_breaks_ends_with_an_error_and_without_its_mark():
    steps = iter(range(8))

    def fail():
        if next(steps, None) is None:
            raise RuntimeError("of the model")

    with running({"nonce": NonceBackbone(before_step=fail)}) as server:
        asked = {"model": "nonce", "messages": [{"role": "user", "content": ask(new_nonce(), "t")}], "stream": True}
        text = server.http().post("/v1/chat/completions", json=asked).text
    *_, last = (line for line in text.split("\n") if line)
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "of the model" not in text


torch_nan = float("nan")
