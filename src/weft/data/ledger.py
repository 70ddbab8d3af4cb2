"""What was read, kept and dropped: counts by source and stage, and the sums that must hold."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from weft.data.stage import Count, Processed
from weft.errors import WeftError


@dataclass
class Tally:
    """Adds up processed records; mutable, one per build. A stage is named by its place: `read`, a filter, `unique`."""

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
        self.kept += item.kept
        self.added += item.record.added if item.document is not None else 0
        for drop in item.drops:
            self.dropped[drop.stage] = self.dropped.get(drop.stage, Count()) + drop.count
            self.reasons[drop.stage, drop.loss.what, drop.loss.reason] += 1

    @property
    def lost(self) -> Count:
        return sum(self.dropped.values(), Count())

    def check(self) -> None:
        """Raises `WeftError` unless kept + dropped = read for records, texts and images."""
        if self.kept + self.lost != self.read:
            raise WeftError(f"the counts do not add up: read {self.read}, kept {self.kept}, dropped {self.lost}")

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
