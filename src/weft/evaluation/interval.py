"""A share of n and how well n knows it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, with the 95 % Wilson score interval, which stays inside [0, 1] and is honest near its ends."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.n:
            return (0.0, 1.0)
        z, p = 1.959963984540054, self.value
        scale = 1 + z * z / self.n
        middle = (p + z * z / (2 * self.n)) / scale
        reach = z / scale * math.sqrt(p * (1 - p) / self.n + z * z / (4 * self.n**2))
        return (max(0.0, middle - reach), min(1.0, middle + reach))

    def to_json(self) -> dict[str, object]:
        low, high = self.interval
        return {"value": round(self.value, 4), "low": round(low, 4), "high": round(high, 4), "n": self.n}


def share(hits: list[bool]) -> Share:
    return Share(sum(hits), len(hits))
