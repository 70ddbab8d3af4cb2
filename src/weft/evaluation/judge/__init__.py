"""Who judges: a model behind an OpenAI-compatible server, stored replies, or a rule, for tests.

    questions --ask--> (question, Verdict)        a reply that cannot be read is asked for again, at most twice

Scores of different judges are never put in one table: the judge's name is part of a metric's.
"""

import base64
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import NonNegativeFloat, PositiveInt

from weft.config import Config
from weft.document import Part, Text
from weft.errors import UsageError
from weft.evaluation.metrics.interleaved import Single
from weft.images import decode_image, encode_png
from weft.llm import BatchConfig, Cached, Failure, HttpConfig, Port, Reply, Request, Result, open_port

TRIES = 3


class ReplayConfig(Config):
    """Replies that were kept: the `judge.jsonl` of an evaluation."""

    kind: Literal["replay"] = "replay"
    file: Path
    model: str
    """The judge whose replies they are."""


class RuleConfig(Config):
    """No model: the score is the number of parts of the output, at most the highest. For tests and examples."""

    kind: Literal["rule"] = "rule"
    model: str = "rule"


class JudgeConfig(Config):
    """Who is asked, and how."""

    port: Annotated[HttpConfig | BatchConfig | ReplayConfig | RuleConfig, pydantic.Field(discriminator="kind")]
    temperature: NonNegativeFloat = 0.0
    samples: PositiveInt = 1
    """Replies to each question; with several a score is their mean, and their spread is kept."""
    max_tokens: PositiveInt = 512
    image_side: PositiveInt = 512
    """The longest side of a picture, in pixels."""
    image_format: Literal["png", "jpeg"] = "png"
    """JPEG is of quality 95."""
    together: bool = False
    """All criteria of a rubric in one request: cheaper, but then each sways the others. Part of the judge's name."""
    single_image: Single = "ask"
    """Criteria that compare pictures, where there is only one."""


@dataclass(frozen=True)
class Question:
    id: str
    messages: tuple[Mapping[str, Any], ...]
    reply_form: str
    """What is said again when a reply cannot be read."""


@dataclass(frozen=True)
class Verdict:
    """What came of one question."""

    value: float | None
    """None: no reply could be read."""
    replies: tuple[str, ...]
    """As they came, those that could not be read as well."""
    spread: float | None = None
    """Standard deviation, of several replies."""
    samples: tuple[float | None, ...] = ()
    """Of each reply that was asked for."""


class Judge:
    def __init__(self, config: JudgeConfig, port: Port) -> None:
        self.config, self._port = config, port
        self.name = f"{port.model}{'-together' if config.together else ''}" + (
            f"-x{config.samples}" if config.samples > 1 else ""
        )
        self.settings = config.model_dump(mode="json", exclude={"port"}) | {"model": port.model}
        """What a score depends on; not where the server is."""

    @classmethod
    def open(cls, config: JudgeConfig, cache: Path) -> "Judge":
        """
        Args:
            cache: keeps every raw reply.
        """
        match config.port:
            case RuleConfig(model=model):
                return cls(config, _Rule(model))
            case ReplayConfig(file=file, model=model):
                if not file.is_file():
                    raise UsageError("there are no stored replies", where=str(file), fix="name a judge.jsonl")
                return cls(config, Cached(_Nobody(model), file))
            case port:
                return cls(config, Cached(_Spoken(open_port(port)), cache))

    def ask(
        self,
        questions: Sequence[Question],
        read: Callable[[str], float | None],
        *,
        tries: int = TRIES,
        warmer: bool = False,
    ) -> Iterator[tuple[Question, Verdict]]:
        """Verdicts as they come; a question that the server failed to answer has none.

        Args:
            read: a reply's score; None where it has none.
            warmer: raise the temperature from try to try, instead of saying again how to reply.
        """
        by_id = {question.id: question for question in questions}
        scores: dict[str, list[float | None]] = {each: [None] * self.config.samples for each in by_id}
        replies: dict[str, list[str]] = {each: [] for each in by_id}
        failed: set[str] = set()
        waiting = [(question.id, sample) for question in questions for sample in range(self.config.samples)]
        for attempt in range(tries):
            requests = {f"{each}\0{sample}": (each, sample) for each, sample in waiting}
            again = []
            for request, result in self._port.complete(
                [self._request(name, by_id[each], sample, attempt, warmer) for name, (each, sample) in requests.items()]
            ):
                each, sample = requests[request.id]
                if isinstance(result, Failure):
                    failed.add(each)
                    continue
                replies[each].append(result.text)
                value = read(result.text)
                if value is None:
                    again.append((each, sample))
                else:
                    scores[each][sample] = value
            waiting = sorted(again)
        for each, question in by_id.items():
            if each not in failed:
                yield question, _verdict(scores[each], replies[each])

    def _request(self, name: str, question: Question, sample: int, attempt: int, warmer: bool) -> Request:
        messages, temperature = question.messages, self.config.temperature
        if attempt and warmer:
            temperature += 0.1 * attempt
        elif attempt:
            messages = (*messages, {"role": "user", "content": f"Your reply could not be read. {question.reply_form}"})
        return Request(
            name,
            messages,
            temperature=temperature,
            max_tokens=self.config.max_tokens,
            seed=sample * 100 + attempt,
        )

    def content(self, parts: Sequence[Part], of: str) -> list[dict[str, Any]]:
        """Parts as a chat model takes them; each picture under a name, such as `output image 2`."""
        found: list[dict[str, Any]] = []
        number = 0
        for part in parts:
            if isinstance(part, Text):
                if part.text.strip():
                    found.append({"type": "text", "text": part.text})
            else:
                number += 1
                found.append({"type": "text", "text": f"{of} image {number}"})
                found.append({"type": "image_url", "image_url": {"url": self._data_uri(part.data or b"")}})
        return found

    def _data_uri(self, data: bytes) -> str:
        picture = decode_image(data)
        picture.thumbnail((self.config.image_side, self.config.image_side))
        if self.config.image_format == "png":
            return f"data:image/png;base64,{base64.b64encode(encode_png(picture)).decode()}"
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _verdict(samples: Sequence[float | None], replies: Sequence[str]) -> Verdict:
    read = [each for each in samples if each is not None]
    if not read:
        return Verdict(None, tuple(replies), None, tuple(samples))
    spread = statistics.pstdev(read) if len(read) > 1 else None
    # arrival decides the order of replies, and must not decide the record
    told = tuple(replies if len(replies) == 1 else sorted(replies))
    return Verdict(statistics.fmean(read), told, spread, tuple(samples))


class _Spoken:
    """A port whose empty replies are failures, so that no cache keeps them."""

    def __init__(self, port: Port) -> None:
        self._port, self.model = port, port.model

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        for request, result in self._port.complete(requests):
            if isinstance(result, Reply) and not result.text.strip():
                yield request, Failure("malformed", "an empty reply")
            else:
                yield request, result


class _Nobody:
    """Knows nothing beyond what is cached."""

    def __init__(self, model: str) -> None:
        self.model = model

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        for request in requests:
            yield request, Failure("missing", "no stored reply to this question")


class _Rule:
    """Counts what follows the last heading of a request."""

    def __init__(self, model: str) -> None:
        self.model = model

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        for request in requests:
            parts = [part for message in request.messages for part in _parts(message)]
            heads = [i for i, part in enumerate(parts) if str(part.get("text", "")).startswith("### ")]
            output = [part for part in parts[heads[-1] + 1 if heads else 0 :] if not _is_name(part)]
            yield request, Reply(f"The output has {len(output)} parts.\nScore: {min(5, len(output))}", self.model)


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _is_name(part: Mapping[str, Any]) -> bool:
    return str(part.get("text", "")).startswith(("input image ", "output image "))
