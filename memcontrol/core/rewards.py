"""Owns the plain form of measured rewards, as files, the database and every --json hold it: the value under
its NAME, and beside it NAME_error, or NAME_low and NAME_high, and NAME_p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memcontrol.core.estimate import Estimate

ERROR, LOW, HIGH, P = "_error", "_low", "_high", "_p"  # spelt here and nowhere else
# Half a 95 % interval in standard errors, as it is read back. Rounded, unlike NORMAL_95: plots, ties and the
# errors of hypervolumes were made with it from the first study on, and must come out the same of old studies.
READ_95 = 1.96


@dataclass(frozen=True)
class Rewards:
    """The rewards of one model in their plain form, and what that says of each."""

    plain: Mapping[str, float]

    @classmethod
    def from_estimates(cls, measured: Mapping[str, Estimate | float]) -> Rewards:
        plain: dict[str, float] = {}
        for name, value in measured.items():
            plain[name] = float(value)
            if isinstance(value, Estimate):
                plain |= list_beside(name, value)
        return cls(plain)

    def to_plain(self) -> dict[str, float]:
        return dict(self.plain)

    def interval(self, name: str) -> tuple[float, float]:
        """The 95 % interval; the value twice where nothing is known of its error."""
        if name + LOW in self.plain:
            return self.plain[name + LOW], self.plain[name + HIGH]
        reach = READ_95 * self.plain.get(name + ERROR, 0.0)
        return self.plain[name] - reach, self.plain[name] + reach

    def error(self, name: str) -> float:
        """The standard error, from what is beside the value; 0 where nothing is."""
        if name + ERROR in self.plain:
            return self.plain[name + ERROR]
        if name + LOW in self.plain:
            return (self.plain[name + HIGH] - self.plain[name + LOW]) / (2 * READ_95)
        return 0.0

    def p(self, name: str) -> float:
        return self.plain[name + P]

    def written(self, name: str, form: str, mark: str = "") -> str:
        """The value in a form such as "{:.1f}", with its error and a mark behind that, or with its interval:
        "22.6 ± 0.8", "1.2% (0.4%-2.8%)"; empty where it was not measured."""
        if name not in self.plain:
            return ""
        text = form.format(self.plain[name])
        if name + ERROR in self.plain:
            return f"{text} ± {form.format(self.plain[name + ERROR])}{mark}"
        if name + LOW in self.plain:
            return f"{text} ({form.format(self.plain[name + LOW])}-{form.format(self.plain[name + HIGH])})"
        return text


def list_beside(name: str, estimate: Estimate) -> dict[str, float]:
    """What stands beside an estimate's value: its error or, without one, its interval; and its p."""
    ends = {LOW: estimate.low, HIGH: estimate.high} if estimate.error is None else {ERROR: estimate.error}
    beside = ends | {P: estimate.p}
    return {name + suffix: float(number) for suffix, number in beside.items() if number is not None}


def strip_end(name: str) -> str:
    """NAME of NAME_low and NAME_high, which limits may be put on; any other name as it is."""
    return name.removesuffix(LOW).removesuffix(HIGH)
