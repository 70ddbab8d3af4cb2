"""What may be asked, field by field: the requests of OpenAI's three interfaces, and what Weft adds to them.

A field that would change the answer and is not supported is refused by its name; fields that change nothing, which
clients send of their own accord, are accepted. Nothing is ignored in silence.
"""

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator

Probability = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Delivery = Literal["inline", "url"]
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")]
Off = Annotated[float, Field(ge=0, le=0)]
Label = Annotated[str, StringConstraints(max_length=512)]
Metadata = Annotated[dict[Annotated[str, StringConstraints(max_length=64)], Label], Field(max_length=16)]
"""As OpenAI bounds it: it comes back in every answer, and in single lines of a stream."""


class Extras(pydantic.BaseModel):
    """Weft's own fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    seed: Seed | None = None
    """The same seed gives the same answer, whatever else is being answered."""
    max_images: NonNegativeInt | None = None
    min_images: NonNegativeInt | None = None
    image_size: Size | None = None
    """`WIDTHxHEIGHT`, or `auto`."""
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """Classifier-free guidance of pictures; 1 is off."""
    num_inference_steps: Annotated[PositiveInt, Field(le=1000)] | None = None
    """Of a diffusion decoder."""
    image_delivery: Delivery | None = None
    """Pictures as base64 in the answer, or by an address to fetch them from. Default: inline, and url in a stream."""


class Asked(Extras):
    """What all three have in common; Weft's own fields are flat, so that `extra_body` of the SDK carries them."""

    model: str
    extra_body: Extras | None = None
    """The same fields once more, as some clients nest them; what stands outside counts."""
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def delivery(self) -> Delivery:
        """Lines of a stream are short, or clients cannot read them."""
        return self.image_delivery or ("url" if getattr(self, "stream", None) else "inline")

    @model_validator(mode="after")
    def _flatten(self) -> Self:
        for name in Extras.model_fields if self.extra_body is not None else ():
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.extra_body, name))
        return self


class Plain(pydantic.BaseModel):
    """Text as it comes."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class TextFormat(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Plain


class Tool(pydantic.BaseModel):
    """Its settings are Weft's own fields of the request."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["image_generation"]


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    modalities: list[Literal["text", "image"]] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    n: Literal[1] | None = None
    frequency_penalty: Off | None = None
    presence_penalty: Off | None = None
    logprobs: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: Plain | None = None
    response_image_format: Literal["images", "parts", "markdown"] = "images"
    """Pictures beside the text with their place in it, as parts in order, or as Markdown in the text."""

    @property
    def delivery(self) -> Delivery:
        # Markdown names pictures by address: text that holds them whole freezes the pages that show it
        return "url" if self.response_image_format == "markdown" else super().delivery


class ResponsesRequest(Asked):
    """`POST /v1/responses`."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    max_output_tokens: PositiveInt | None = None
    tools: Annotated[list[Tool], Field(max_length=1)] | None = None
    """Changes nothing: pictures are always possible."""
    tool_choice: Literal["none", "auto"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    text: TextFormat | None = None
    truncation: Literal["disabled"] | None = None
    parallel_tool_calls: bool | None = None


class ImagesRequest(Asked):
    """`POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1)]
    n: Annotated[PositiveInt, Field(le=4)] | None = None
    size: Size | None = None
    temperature: Temperature | None = None
    """1 unless it is given; at 0, all n are the same."""
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto", "standard"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None

    @property
    def delivery(self) -> Delivery:
        return self.image_delivery or ("url" if self.response_format == "url" else "inline")
