"""An answer on paper: everything in order, text as text, whole or not there."""

import html
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image as PILImage

from weft.atomic import verify_folder
from weft.document import Document, Image, Text, assistant, from_json, user
from weft.generation import Answer, Usage
from weft.generation.render import escape_markdown, to_html, to_markdown, write_answer, write_page


def picture(color: str, kind: str = "PNG", side: int = 8) -> Image:
    buffer = io.BytesIO()
    PILImage.new("RGB", (side, side), color).save(buffer, kind)
    return Image(buffer.getvalue())


PROMPT = Document((user(picture("white", "JPEG"), "two things <script>alert(1)</script>"),))
PARTS = (Text("first"), picture("red"), picture("blue", side=300), Text(" then\nsecond "))
ANSWER = Answer(PARTS, "stop", Usage(prompt_tokens=5, text_tokens=2, image_tokens=8))


def test_a_folder_holds_the_answer_in_order(tmp_path):
    write_answer(tmp_path / "a", PROMPT, ANSWER, made_by={"model": "nano"})
    verify_folder(tmp_path / "a")
    assert (tmp_path / "a/answer.md").read_text() == (
        "first\n\n![picture 1](picture_1.png)\n\n![picture 2](picture_2.png)\n\nthen\\\nsecond\n"
    )
    assert (tmp_path / "a/picture_1.png").read_bytes() == PARTS[1].data
    document = from_json(json.loads((tmp_path / "a/answer.json").read_text()))
    assert [type(part).__name__ for part in document.parts] == ["Image", "Text", "Text", "Image", "Image", "Text"]
    written = [(tmp_path / "a" / image.path).read_bytes() for image in document.images]
    assert written == [image.data for image in (*PROMPT.images, *ANSWER.images)]
    assert document.meta["model"] == "nano"
    assert document.meta["reason"] == "stop"


def test_a_page_holds_everything_and_links_to_nothing():
    page = to_html(PROMPT, ANSWER, title="<b>")
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert [source.partition(";")[0] for source in sources] == ["data:image/jpeg", "data:image/png", "data:image/png"]
    assert "<script>" not in page
    assert "<b>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.index("first") < page.index('alt="picture 1"', page.index("first")) < page.index("second")
    assert 'name="viewport"' in page


def test_an_answer_that_cannot_be_written_leaves_nothing(tmp_path):
    broken = Document((user(Image(b"no picture")),))
    with pytest.raises(OSError, match="cannot identify"):
        write_answer(tmp_path / "a", broken, ANSWER, made_by={})
    with pytest.raises(OSError, match="cannot identify"):
        write_page(tmp_path / "a.html", broken, ANSWER, title="t")
    assert list(tmp_path.iterdir()) == []


ORDINARY = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"])
MEANINGFUL = st.sampled_from("*_`#-+=1.)<&[]!|~\n\t>\\")


@given(st.text(ORDINARY | MEANINGFUL, max_size=60))
def test_markdown_shows_the_text_as_it_is(text):
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    page = MarkdownIt().render(escape_markdown(text))
    shown = [html.unescape(line) for line in re.sub(r"</?p>|\n$", "", page).strip("\n").split("<br />\n")]
    assert shown == (wanted or [""])


@pytest.mark.parametrize("raw", ["a\x1b]0;owned\x07b", "a\x00b"])
def test_control_characters_reach_neither_page(raw):
    for shown in (to_markdown(assistant(raw)), to_html(PROMPT, Answer((Text(raw),), "stop", ANSWER.usage), title="t")):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
