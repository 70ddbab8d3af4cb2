"""Every limit of a server, in one object, enforced at the edge."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from weft.config import Config


class Limits(Config):
    """What one caller, one request and the server as a whole may use."""

    head_bytes: PositiveInt = 64 * 2**10
    """Of a request's address and headers."""
    head_seconds: PositiveFloat = 10.0
    """Until they have arrived."""
    body_bytes: PositiveInt = 64 * 2**20
    """Of a request."""
    body_seconds: PositiveFloat = 120.0
    """Until it has arrived."""
    json_depth: PositiveInt = 32
    """Brackets within brackets."""
    json_values: PositiveInt = 20_000
    """Commas and brackets outside of strings: what is small to send may be large to hold."""
    turns: PositiveInt = 256
    text_characters: PositiveInt = 200_000
    """Of all texts of a prompt together."""
    images: NonNegativeInt = 8
    """Of a prompt."""
    image_bytes: PositiveInt = 20 * 2**20
    """Of one picture, encoded."""
    images_bytes: PositiveInt = 40 * 2**20
    """Of all pictures of a prompt together, encoded."""
    image_pixels: PositiveInt = 16_777_216
    answer_images: NonNegativeInt = 16
    """Of an answer, whatever it asks for."""
    answer_text_tokens: PositiveInt = 4096
    """The same for its text."""
    queue: PositiveInt | None = None
    """Requests that wait for a slot; one more is answered 429. None: four for each slot."""
    queue_seconds: PositiveFloat = 60.0
    """A request that waited so long is answered 503."""
    requests_per_minute: PositiveInt | None = 60
    """Of one key; where no key is asked for, nobody is counted."""
    concurrent: PositiveInt | None = 16
    """Requests of one key at the same time."""
    file_seconds: PositiveFloat = 900.0
    """A picture can be fetched by its address so long."""
    files_bytes: PositiveInt = 256 * 2**20
    """Of all such pictures; the oldest make room."""
    keep_alive_seconds: PositiveFloat = 10.0
    """A stream that has nothing to say sends a comment after so many."""
    send_seconds: PositiveFloat = 60.0
    """A reader that takes nothing for so long is cut off."""
    drain_seconds: PositiveFloat = 30.0
    """What runs when the server is asked to end may go on so long."""
