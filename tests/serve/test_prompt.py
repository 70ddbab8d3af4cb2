"""The three shapes of a prompt are one document."""

import base64

import pytest

from tests.data.corpus import encoded, picture
from weft.document import Document, Image, Text, Turn, assistant, user
from weft.errors import ConfigError, DocumentError, ImageError, UsageError
from weft.serve.files import Files, Own
from weft.serve.limits import Limits
from weft.serve.prompt import of_chat, of_images, of_responses, sampling_of
from weft.serve.schema import ChatRequest, ImagesRequest, ResponsesRequest

A, B = encoded(picture(1)), encoded(picture(2), "JPEG")
LIMITS = Limits()


def url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def own():
    return Own(Files(900, 2**20), "me")


def chat(own, *messages, limits=LIMITS):
    return of_chat(ChatRequest(model="m", messages=list(messages)), limits, own)


def responses(own, given, **asked):
    return of_responses(ResponsesRequest(model="m", input=given, **asked), LIMITS, own)


def turn(role, *parts):
    return Turn(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


def test_a_string_is_a_users_turn(own):
    assert responses(own, "hello") == chat(own, {"role": "user", "content": "hello"}) == Document((user("hello"),))
    assert of_images(ImagesRequest(model="m", prompt="hello"), LIMITS, own) == Document((user("hello"),))


def test_instructions_and_developers_speak_as_the_system(own):
    expected = Document((turn("system", "be brief"), turn("system", "be kind"), user("hello")))
    items = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert responses(own, items, instructions="be brief") == expected
    assert chat(own, {"role": "system", "content": "be brief"}, *items) == expected


@pytest.mark.parametrize("named", ["input", "plain"])
def test_parts_keep_their_order(own, named):
    texts = ("input_text", "output_text") if named == "input" else ("text", "text")
    address = (lambda data: url(data)) if named == "input" else (lambda data: {"url": url(data), "detail": "high"})
    kind = "input_image" if named == "input" else "image_url"
    content = [
        {"type": texts[0], "text": "one"}, {"type": kind, "image_url": address(A)},
        {"type": kind, "image_url": address(B)}, {"type": texts[1], "text": "two", "annotations": []},
    ]  # fmt: skip
    expected = Document((user("one", Image(A), Image(B), "two"),))
    assert chat(own, {"role": "user", "content": content}) == expected
    assert responses(own, [{"type": "message", "role": "user", "content": content}]) == expected


def test_items_of_one_answer_are_one_turn(own):
    items = [
        {"role": "user", "content": "draw"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "here"}]},
        {"type": "image_generation_call", "id": "ig", "status": "completed", "result": base64.b64encode(A).decode()},
        # begins with a slash, as addresses do
        {"type": "image_generation_call", "id": "ig", "status": "completed", "result": base64.b64encode(B).decode()},
        {"role": "user", "content": "again"},
    ]
    assert items[3]["result"].startswith("/9j/")
    assert responses(own, items) == Document((user("draw"), assistant("here", Image(A), Image(B)), user("again")))


@pytest.mark.parametrize(
    "offsets, expected",
    [
        ((0, 0), [Image(A), Image(B), "abcd"]),
        ((0, 4), [Image(A), "abcd", Image(B)]),
        ((1, 3), ["a", Image(A), "bc", Image(B), "d"]),
        ((4, 4), ["abcd", Image(A), Image(B)]),
        ((None, None), ["abcd", Image(A), Image(B)]),
        ((2, None), ["ab", Image(A), "cd", Image(B)]),
    ],
)
def test_pictures_stand_at_their_places_in_the_text(own, offsets, expected):
    images = [
        {"type": "image_url", "image_url": {"url": url(data)}} | ({} if at is None else {"text_offset": at})
        for data, at in zip((A, B), offsets, strict=True)
    ]
    message = {"role": "assistant", "content": "abcd", "images": images}
    found = chat(own, message, {"role": "user", "content": "more"})
    assert found.turns[0] == turn("assistant", *expected)


@pytest.mark.parametrize("at", [-1, 5, 1.5, "1", True, [1], 10**30])
def test_places_that_are_none_are_refused(own, at):
    images = [{"image_url": {"url": url(A)}, "text_offset": at}]
    with pytest.raises(DocumentError, match="no place in the text"):
        chat(own, {"role": "assistant", "content": "abcd", "images": images})


def test_pictures_in_markdown_are_those_that_this_server_made(own):
    at = own.put(A)
    content = f"one\n\n![picture]({at})\n\n two\n\n![picture](http://here:80{at})\n\n\n\n![x]({at})\n\n\n"
    found = chat(own, {"role": "assistant", "content": content}, {"role": "user", "content": "x"})
    assert found.turns[0] == turn("assistant", "one", Image(A), " two", Image(A), Image(A), "\n")
    # others stay what they are: nothing is fetched
    for other in ("![a](https://example.org/a.png)", "![a](file:///etc/passwd)", "![a](/v1/files/x/content)"):
        assert chat(own, {"role": "user", "content": other}) == Document((user(other),))


def test_pictures_that_are_gone_are_not_read_as_text(own):
    gone = Own(own.files, "somebody else").put(A)
    for content in (f"see ![picture]({gone})", [{"type": "image_url", "image_url": {"url": gone}}]):
        with pytest.raises(ImageError, match="there is none, or no longer"):
            chat(own, {"role": "user", "content": content})
    with pytest.raises(ImageError, match="there is none, or no longer"):
        responses(own, [{"type": "image_generation_call", "result": gone}])


BAD = [
    {"content": "no role"}, {"role": "tool", "content": "a"}, {"role": None, "content": "a"},
    {"role": ["user"], "content": "a"}, {"role": {}, "content": "a"}, {"role": "user", "content": 5},
    {"role": "user", "content": {"type": "text"}}, {"role": "user", "content": [5]},
    {"role": "user", "content": [[{"type": "text", "text": "a"}]]}, {"role": "user", "content": [{"text": "a"}]},
    {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": [{"type": "text", "text": 5}]},
    {"role": "user", "content": [{"type": "text", "text": None}]},
    {"role": "user", "content": [{"type": ["text"], "text": "a"}]},
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
    {"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]},
    {"role": "user", "content": [{"type": "image_url"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": 5}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": ["a"]}}]},
    {"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]},
    {"role": "user", "content": "a", "images": "b"}, {"role": "user", "content": "a", "images": ["b"]},
    {"role": "user", "content": "a", "images": [{}]},
    {"role": "user", "content": "a\ud800"}, {"role": "user", "content": [{"type": "text", "text": "\udfff"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
    {"role": "assistant", "content": "a", "function_call": {"name": "b"}},
    {"role": "user", "content": "a", "loss": True},
    {"role": "user", "content": ""}, {"role": "user", "content": []}, {"role": "user", "content": None},
]  # fmt: skip


@pytest.mark.parametrize("message", BAD, ids=range(len(BAD)))
def test_what_is_no_message_is_refused_in_both_shapes(own, message):
    with pytest.raises(DocumentError):
        chat(own, message)
    if "images" not in message:
        with pytest.raises(DocumentError):
            responses(own, [{"type": "message", **message}])


@pytest.mark.parametrize(
    "item",
    [
        {"type": "reasoning", "summary": []},
        {"type": "item_reference", "id": "a"},
        {"type": ["message"], "role": "user", "content": "a"},
        {"type": "image_generation_call", "result": None},
        {"type": "image_generation_call", "result": 5},
        {"type": "image_generation_call"},
    ],
)
def test_items_that_are_none_are_refused(own, item):
    with pytest.raises(DocumentError):
        responses(own, [item, {"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "address",
    [
        "data:image/png;base64,", "data:image/png;base64,####", "data:image/png;base64,AAAA", "data:image/png,abc",
        "data:text/html;base64,AAAA", "data:image/png;base64,AAA", "data:;base64,AAAA",
        "data:image/png;base64,iVBOR w0KGgo=", "data:image/png;base64,\u0661\u0662\u0663\u0664",
    ],
)  # fmt: skip
def test_data_that_is_no_picture_is_refused(own, address):
    with pytest.raises(ImageError):
        chat(own, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]})


def sampling(limits=LIMITS, **asked):
    given = asked.pop("given", {})
    return sampling_of(ResponsesRequest(model="m", input="a", **asked), limits, seed=7, **given)


def test_settings_become_those_of_the_engine():
    found = sampling(
        seed=5, max_images=3, min_images=1, image_size="32x16", cfg_scale=3, num_inference_steps=9,
        given={"temperature": 0.5, "top_p": 0.9, "max_tokens": 100},
    )  # fmt: skip
    assert (found.seed, found.max_images, found.min_images, found.size) == (5, 3, 1, (32, 16))
    assert (found.guidance, found.diffusion.guidance, found.diffusion.steps) == (3, 3, 9)
    assert (found.text.temperature, found.image.temperature, found.text.top_p, found.image.top_p) == (
        0.5,
        0.5,
        0.9,
        0.9,
    )
    assert (found.max_tokens, found.max_text_tokens) == (100, LIMITS.answer_text_tokens)
    assert sampling().seed == 7
    assert sampling(image_size="auto").size is None


def test_settings_may_be_nested_and_what_stands_outside_counts():
    nested = {"seed": 5, "max_images": 3, "image_size": "32x16", "image_delivery": "url"}
    assert sampling(extra_body=nested) == sampling(seed=5, max_images=3, image_size="32x16")
    assert sampling(extra_body=nested, seed=6).seed == 6
    assert ResponsesRequest(model="m", input="a", extra_body=nested).image_delivery == "url"


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(UsageError, match="this server allows 16"):
        sampling(max_images=17)
    with pytest.raises(ConfigError, match="forbids a picture"):
        sampling(max_images=1, min_images=2)
