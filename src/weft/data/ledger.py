"""What was read, kept and dropped: counts by source and stage, and the sums that must hold."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from weft.data.stage import Count, Drop, Processed
from weft.errors import WeftError


@dataclass
class Tally:
    """Adds up processed records; mutable. A stage is named by its place: `read`, a filter, `unique`."""

    read: Count = Count()
    kept: Count = Count()
    added: int = 0
    """Texts that sources wrote themselves into what was kept; in none of the counts."""
    dropped: dict[str, Count] = field(default_factory=dict)
    """By stage."""
    reasons: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(stage, what, reason) -> how often."""

    def add(self, item: Processed) -> None:
        self.read += item.record.read
        if item.document is not None:
            self.kept += item.kept
            self.added += item.record.added
        for drop in item.drops:
            self.dropped[drop.stage] = self.dropped.get(drop.stage, Count()) + drop.count
            self.reasons[drop.stage, drop.loss.what, drop.loss.reason] += 1

    def merge(self, other: "Tally") -> None:
        """Add what another one counted."""
        self.read += other.read
        self.kept += other.kept
        self.added += other.added
        for stage, lost in other.dropped.items():
            self.dropped[stage] = self.dropped.get(stage, Count()) + lost
        self.reasons += other.reasons

    def take_back(self, item: Processed) -> None:
        """Drop a record that was counted as kept; its last drop says why."""
        drop = item.drops[-1]
        self.kept -= drop.count
        self.added -= item.record.added
        self.dropped[drop.stage] = self.dropped.get(drop.stage, Count()) + drop.count
        self.reasons[drop.stage, drop.loss.what, drop.loss.reason] += 1

    @property
    def lost(self) -> Count:
        return sum(self.dropped.values(), Count())

    def check(self, stages: Iterable[str] | None = None) -> None:
        """Raise `WeftError` unless kept + dropped = read for records, texts and images.

        Args:
            stages: all that there are, in order: no other may have dropped anything, and none more than entered it.
        """
        if self.kept + self.lost != self.read:
            raise WeftError(f"the counts do not add up: read {self.read}, kept {self.kept}, dropped {self.lost}")
        if stages is None:
            return
        names, left = list(stages), self.read
        unknown = self.dropped.keys() - set(names)
        if unknown:
            raise WeftError(f"the counts do not add up: {sorted(unknown)} dropped something and is no stage")
        for name in names:
            left -= self.dropped.get(name, Count())
            if min(left.records, left.texts, left.images) < 0:
                raise WeftError(f"the counts do not add up: stage {name} dropped more than entered it, {left} is left")

    def funnel(self, stages: Iterable[str]) -> list[dict[str, Any]]:
        """What entered and left every stage, in order."""
        rows, left = [], self.read
        for stage in stages:
            lost = self.dropped.get(stage, Count())
            reasons = {f"{what}: {why}": n for (at, what, why), n in sorted(self.reasons.items()) if at == stage}
            rows.append({"stage": stage, "in": asdict(left), "dropped": asdict(lost), "reasons": reasons})
            left -= lost
        return rows

    def to_json(self) -> dict[str, Any]:
        counts = {"read": asdict(self.read), "kept": asdict(self.kept), "dropped": asdict(self.lost)}
        return {**counts, "instructions_added": self.added}

    def to_state(self) -> dict[str, Any]:
        """Everything, as JSON; `from_state` reads it back."""
        reasons = [[*place, n] for place, n in sorted(self.reasons.items())]
        dropped = {stage: asdict(lost) for stage, lost in self.dropped.items()}
        return {
            "read": asdict(self.read),
            "kept": asdict(self.kept),
            "added": self.added,
            "dropped": dropped,
            "reasons": reasons,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Tally":
        dropped = {stage: Count(**lost) for stage, lost in state["dropped"].items()}
        reasons = Counter({(stage, what, reason): n for stage, what, reason, n in state["reasons"]})
        return cls(Count(**state["read"]), Count(**state["kept"]), state["added"], dropped, reasons)


def check_rows(rows: int, tally: Tally) -> None:
    """Raise `WeftError` unless as many rows were written as documents were kept."""
    if rows != tally.kept.records:
        raise WeftError(f"the counts do not add up: {rows} rows were written for {tally.kept.records} kept documents")


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def entry_of(drop: Drop, source: int, form: str | None) -> dict[str, Any]:
    """What the ledger says of a drop: the number of its source and the format come first."""
    return {"source": source, "format": form, **drop.to_json()}


def line_of(entry: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(entry).encode() + b"\n"
