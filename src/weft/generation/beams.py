"""The likeliest text of an answer by beam search: what captions and short answers are scored with.

    score = log-probability / length ** length_penalty

The rules are transformers': of the best (1 + stops) * beams continuations, those that stop are hypotheses if they are
among the best `beams`; the search ends when no running beam, at its present length, is better than the worst of `beams`
hypotheses. Text ends with the model's end, or where it would begin a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from weft.backbones.base import Backbone, SpecialTokens, check_fits, encode_document
from weft.config import Config
from weft.document import Document
from weft.generation.cache import SlotCache
from weft.generation.events import Event, Finished, Reason, TextDelta, Usage
from weft.generation.inputs import TEXT, Input, to_tensors
from weft.generation.sights import Sights
from weft.layout import TokenSequence, lay_out
from weft.synchronizer.sight import see

Ended = Literal["stop", "image", "length"]


class BeamConfig(Config):
    """Defaults are MM-Interleaved's."""

    beams: PositiveInt = 5
    max_tokens: PositiveInt = 30
    min_tokens: NonNegativeInt = 0
    """Text does not stop before it has so many."""
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Above 0 favours long texts, below 0 short ones."""
    repetition_penalty: PositiveFloat = 1.0
    """Log-probabilities of what the text already has are multiplied by it; 1 is off."""


@dataclass(frozen=True)
class Hypothesis:
    text: str
    ids: tuple[int, ...]
    """Without what ended it."""
    score: float
    ended: Ended


@torch.no_grad()
def beam_search(backbone: Backbone, document: Document, config: BeamConfig = BeamConfig()) -> list[Hypothesis]:
    """The best texts that begin an answer, the best first, at most `config.beams`.

    Args:
        document: ends with a turn to be answered; its pictures hold their bytes.

    Raises:
        ContextError: prompt and text do not fit into the context.
    """
    prompt = encode_document(backbone, document, answer=True)
    check_fits(prompt, backbone.context_length, reserve=config.max_tokens)
    rows = Rows(backbone, prompt, config.beams)
    stops = _stops(backbone.tokens)
    forbidden = [i for i in backbone.tokens if i not in stops]
    running = [_Beam((), 0.0)]
    finished: list[tuple[float, _Beam]] = []
    for length in range(1, config.max_tokens + 1):
        scores = torch.log_softmax(rows.logits([beam.ids for beam in running]).float(), -1)
        _penalise(scores, running, config.repetition_penalty)
        scores[:, forbidden] = -torch.inf
        if length <= config.min_tokens:
            scores[:, list(stops)] = -torch.inf
        totals = scores + torch.tensor([[beam.score] for beam in running], device=scores.device)
        best = totals.flatten().topk(min((1 + len(stops)) * config.beams, totals.numel()))
        candidates = [
            (value, divmod(place, totals.shape[1]))
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if value > -torch.inf
        ]
        is_last = length == config.max_tokens
        going: list[tuple[int, _Beam]] = []
        for rank, (value, (parent, token)) in enumerate(candidates):
            beam = _Beam((*running[parent].ids, token), value)
            if token in stops or is_last:
                if rank < config.beams:
                    finished.append((value / length**config.length_penalty, beam))
            elif len(going) < config.beams:
                going.append((parent, beam))
        finished = sorted(finished, key=lambda scored: -scored[0])[: config.beams]
        if is_last or not going or _is_settled(finished, going[0][1].score, length, config):
            break
        rows.keep([parent for parent, _ in going])
        running = [beam for _, beam in going]
    return [_hypothesis(backbone, score, beam, stops) for score, beam in finished]


def best_text(backbone: Backbone, document: Document, config: BeamConfig = BeamConfig()) -> list[Event]:
    """The likeliest text as the events of an answer, which has no pictures."""
    best = beam_search(backbone, document, config)[0]
    prompt = len(encode_document(backbone, document, answer=True))
    reason: Reason = "length" if best.ended == "length" else "stop"
    return [TextDelta(0, best.text), Finished(0, reason, Usage(prompt, len(best.ids), 0))]


@dataclass(frozen=True)
class _Beam:
    ids: tuple[int, ...]
    score: float
    """Log-probability."""


def _stops(tokens: SpecialTokens) -> dict[int, Ended]:
    return {tokens.begin_image: "image", tokens.end: "stop", tokens.separator: "stop"}


def _penalise(scores: Tensor, beams: Sequence[_Beam], penalty: float) -> None:
    if penalty == 1:
        return
    for row, beam in zip(scores, beams, strict=True):
        said = list(set(beam.ids))
        row[said] *= penalty  # log-probabilities are never above zero


def _is_settled(finished: Sequence[tuple[float, _Beam]], best: float, length: int, config: BeamConfig) -> bool:
    return len(finished) == config.beams and best / length**config.length_penalty <= finished[-1][0]


def _hypothesis(backbone: Backbone, score: float, beam: _Beam, stops: dict[int, Ended]) -> Hypothesis:
    ended = stops.get(beam.ids[-1], "length")
    ids = beam.ids if ended == "length" else beam.ids[:-1]
    return Hypothesis(backbone.detokenize(ids), ids, score, ended)


class Rows:
    """The beams' caches: one prompt, read once, and what each beam has after it."""

    def __init__(self, backbone: Backbone, prompt: TokenSequence, beams: int) -> None:
        self._backbone, self._beams = backbone, beams
        self._at, self._token = len(prompt) - 1, int(prompt.ids[-1])
        self._cache = SlotCache(beams, backbone.context_length)
        self._grids = torch.zeros(beams, 1, 2, dtype=torch.int64, device=backbone.device)
        self._sights = None if backbone.synchronizer is None else Sights(backbone.synchronizer, beams)
        self._seen = len(prompt.pixels)
        self._read(prompt)

    def _read(self, prompt: TokenSequence) -> None:
        """All of the prompt but its last token, into every slot."""
        backbone, count = self._backbone, self._at
        ids, layout = prompt.ids[None].to(backbone.device), lay_out([prompt.spans]).to(backbone.device)
        features, sight = prompt.dense_features(), None
        features = None if features is None else features[None].to(backbone.device)
        if backbone.synchronizer is not None:
            pixels = torch.stack([each.seen for each in prompt.pixels]) if prompt.pixels else None
            layout, vectors, looks = see(backbone.synchronizer, pixels, ids, layout, backbone.tokens.begin)
            features, sight = features if vectors is None else vectors, layout.sight
            if looks is not None and self._sights is not None:
                self._sights.add(range(self._beams), looks)
        if not count:
            return
        layout = layout[:count].seeing(sight and sight[:count])
        step = self._cache.step(torch.arange(count, device=backbone.device)[None], reach=count, slots=[0])
        embeds = backbone.embed(ids[:, :count], layout, None if features is None else features[:, :count])
        backbone.forward(embeds, layout, step)
        self._cache.reorder([0] * self._beams)

    def logits(self, beams: Sequence[tuple[int, ...]]) -> Tensor:
        """(n, V) after each beam's last token."""
        said = [ids[-1] if ids else self._token for ids in beams]
        said += [self._backbone.tokens.pad] * (self._beams - len(said))
        inputs = [Input(token, self._at, TEXT, TEXT) for token in said]
        ids, positions, layout = to_tensors(inputs, self._grids)
        if self._sights is not None:
            layout = layout.seeing(self._sights.step([self._seen] * self._beams))
        step = self._cache.step(positions, reach=self._at + 1)
        hidden = self._backbone.forward(self._backbone.embed(ids, layout), layout, step)
        self._at += 1
        return self._backbone.text_logits(hidden[: len(beams), 0])

    def keep(self, parents: Sequence[int]) -> None:
        """Beam i goes on from what beam parents[i] was."""
        self._cache.reorder([*parents, *([0] * (self._beams - len(parents)))])
