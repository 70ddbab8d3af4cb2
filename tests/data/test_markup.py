"""Markdown and HTML give their text and pictures in reading order, and nothing is left out without a word."""

import base64
import json

import pytest

from tests.data.corpus import encoded, line, picture, png, write
from weft.data import open_dataset
from weft.data.build import BuildConfig, build
from weft.data.sources.markup import Page, Picture, parse_html, parse_markdown
from weft.data.stage import Count, RecordError
from weft.document import Image, Text

MARKDOWN = """\
---
title: A bird box
author: [x]
date: 2024-01-02
---
# Head *ing*

First
line ![a](1.png) after. [![in a link](2.png)](http://z) end

- item
  - nested `code`
- ![](3.png) later

3. three
4. four

| a | b |
|---|---|
| c ![t](4.png) | d |
| | e |

<img src="5.png"> <b>bold</b> text<br>next &lt;b&gt;

```python
if x:
    y  =  1
```
<script>hidden()</script> <!-- hidden -->

> quoted
"""


def test_markdown_in_reading_order():
    page = parse_markdown(MARKDOWN)
    assert page.title == "A bird box"
    assert page.meta == {"title": "A bird box", "date": "2024-01-02"}
    assert page.parts == (
        "# Head ing\n\nFirst line",
        Picture("1.png"),
        "after.",
        Picture("2.png"),
        "end\n\n- item\n- nested `code`",
        Picture("3.png"),
        "- later\n\n3. three\n4. four\n\na | b\nc",
        Picture("4.png"),
        "| d\n| e",
        Picture("5.png"),
        "bold text\nnext <b>\n\n```\nif x:\n    y  =  1\n```\n\nquoted",
    )


def test_html_in_reading_order():
    page = parse_html(
        b"<html><head><title>The  title</title><style>p{}</style></head><!-- no --><p>a<span>b</span> <i>c</i></p>d"
        b"<figure><img src='a b.png'><figcaption>cap</figcaption></figure><svg><text>x</text></svg><img>"
        b"<noscript>no</noscript></html>"
    )
    assert page == Page("The title", ("ab c\n\nd", Picture("a b.png"), "cap", Picture(None), Picture(None)))


@pytest.mark.parametrize("depth", [30, 700])
def test_deep_nesting_is_read_or_refused_but_never_cut(depth):
    for parse, text in (
        (parse_markdown, ">" * depth + " deep"),
        (parse_markdown, "\n".join("  " * i + "- item" for i in range(depth)) + " deep"),
        (parse_html, b"<div>" * depth + b"deep" + b"</div>" * depth),
    ):
        if depth <= 30:
            (part,) = parse(text).parts
            assert part.endswith("deep")
        else:
            with pytest.raises(RecordError, match="too deeply"):
                parse(text)


def test_html_is_read_in_its_encoding_or_refused():
    assert parse_html("<meta charset=windows-1251><p>шаг".encode("windows-1251")).parts == ("шаг",)
    assert parse_html("\ufeff<p>шаг".encode("utf-16")).parts == ("шаг",)
    assert parse_html("<p>шаг".encode()).parts == ("шаг",)
    for page in (b"<p>\xff", b"<meta charset=utf-8><p>\xe9", b"<meta charset=klingon><p>x", b"<meta charset=hex><p>00"):
        with pytest.raises(RecordError, match="encoding"):
            parse_html(page)


def test_front_matter_that_is_none_is_text_and_broken_one_is_refused():
    assert parse_markdown("---\nwords\n---\n").parts == ("## words",)
    with pytest.raises(RecordError, match="front matter"):
        parse_markdown("---\na: [\n---\n")


def test_where_pictures_are_found(tmp_path):
    pictures = {"in/pics/a b.png": png(1), "in/top.png": png(2), "second/pics/c.jpg": encoded(picture(3), "JPEG")}
    inline = f"data:image/png;base64,{base64.b64encode(png(4)).decode()}"
    post = (
        "# Post\n\n1 ![](../pics/a%20b.png?raw=true) 2 ![](../top.png) 3 ![](pics/c.jpg) 4 "
        f"![]({inline}) 5 ![](data:image/png;base64,###) 6 ![](https://example.org/x.png) 7 ![](//example.org/x.png) "
        "8 ![](file:///etc/hostname) 9 ![](../../second/pics/c.jpg) 10 ![](/etc/hostname) 11 ![](pics/none.png) 12"
    )
    write(tmp_path, {**pictures, "in/posts/post.md": post.encode()})
    source = {"kind": "folder", "path": str(tmp_path / "in"), "images": str(tmp_path / "second")}
    summary = build(BuildConfig.model_validate({"sources": [source]}), tmp_path / "out")
    (document,) = open_dataset(tmp_path / "out")
    answer = document.turns[1].parts
    assert document.turns[0].parts == (Text("write an illustrated document: Post"),)
    assert [part.data for part in answer if isinstance(part, Image)] == [
        png(1),
        png(2),
        pictures["second/pics/c.jpg"],
        png(4),
    ]
    assert [part.text.split()[-1] for part in answer if isinstance(part, Text)] == [str(n) for n in range(1, 13)]
    entries = [json.loads(entry) for entry in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == [
        "image_inline", "image_remote", "image_remote", "image_remote", "image_path", "image_path", "image_missing",
    ]  # fmt: skip
    assert summary.total.read == Count(1, 12, 11)

    # the other policy: a document that misses a picture is dropped with all it holds
    build(BuildConfig.model_validate({"sources": [{**source, "on_bad_image": "record"}]}), tmp_path / "strict")
    (entry,) = [json.loads(entry) for entry in (tmp_path / "strict" / "ledger.jsonl").read_text().splitlines()]
    assert (entry["what"], entry["texts"], entry["images"]) == ("record", 12, 11)


def test_numbered_files_are_one_document_in_natural_order(tmp_path):
    steps = {f"in/howto/step_{i}.md": f"# Step {i}\n\n![](p{i}.png)".encode() for i in (10, 1, 2, 9)}
    pictures = {f"in/howto/p{i}.png": png(i) for i in (1, 2, 9, 10)}
    write(tmp_path, {**steps, **pictures, "in/howto/notes.md": b"alone", "in/other/1.html": b"<h1>One</h1>"})
    source = {"kind": "folder", "path": str(tmp_path / "in"), "documents": "steps"}
    build(BuildConfig.model_validate({"sources": [source]}), tmp_path / "out")
    documents = {document.id: document for document in open_dataset(tmp_path / "out")}
    assert documents.keys() == {"howto", "howto/notes.md", "other"}
    assert [text.text for text in documents["howto"].turns[1].parts[::2]] == [f"# Step {i}" for i in (1, 2, 9, 10)]
    assert [image.data for image in documents["howto"].images] == [png(i) for i in (1, 2, 9, 10)]


def test_formats_found_by_looking_are_all_named(tmp_path):
    files = {
        "README.md": b"about",
        "post.md": b"# Post\n\ntext",
        "page.HTM": b"<h1>Page</h1>",
        "chat/data.jsonl": line({"messages": [{"role": "assistant", "content": "hi"}]}),
        "how/doc.json": line({"title": "T", "elements": [{"type": "text", "text": "t"}]}),
        "how/original/step.md": b"# not read",
        "table.csv": b"a,b",
        ".git/config": b"",
    }
    write(tmp_path / "in", files)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    summary = build(
        BuildConfig.model_validate({"sources": [{"kind": "auto", "path": str(tmp_path / "in")}]}), tmp_path / "out"
    )
    entries = [json.loads(entry) for entry in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert {entry["file"]: entry["reason"] for entry in entries} == {
        ".git": "hidden",
        "README.md": "readme",
        "how/original/step.md": "beside_doc_json",
        "loop": "link",
        "table.csv": "other_format",
    }
    formats = {source.format: source.tally.kept.records for source in summary.sources}
    assert formats == {"chat_jsonl": 1, "elements": 1, "folder": 2}
