import pytest
from PIL import Image as PILImage

from weft.document import Image, Text
from weft.generation import Finished, ImageBegin, ImageReady, TextDelta, Usage, collect
from weft.images import decode_image

USAGE = Usage(3, 2, 4)


def test_an_answer_keeps_the_order_and_joins_the_text_between_pictures():
    red, blue = PILImage.new("RGB", (2, 2), "red"), PILImage.new("RGB", (2, 2), "blue")
    answer = collect(
        [
            *(ImageBegin(7, 0), ImageReady(7, 0, red), TextDelta(7, "A c"), TextDelta(7, "at.")),
            *(ImageBegin(7, 1), ImageReady(7, 1, blue), TextDelta(7, "End."), Finished(7, "stop", USAGE)),
        ]
    )
    assert [type(part) for part in answer.parts] == [Image, Text, Image, Text]
    assert answer.text == "A cat.\nEnd."
    assert [decode_image(image.data).getpixel((0, 0)) for image in answer.images] == [(255, 0, 0), (0, 0, 255)]
    assert (answer.reason, answer.usage) == ("stop", USAGE)


def test_a_picture_that_was_not_made_ready_is_no_part():
    answer = collect([TextDelta(0, "x"), ImageBegin(0, 0), Finished(0, "cancelled", USAGE)])
    assert answer.parts == (Text("x"),)


@pytest.mark.parametrize("events", [[], [TextDelta(0, "x")], [TextDelta(0, "x"), Finished(1, "stop", USAGE)]])
def test_events_that_tell_no_single_answer_are_refused(events):
    with pytest.raises(ValueError, match="events"):
        collect(events)
