"""How far a run is, and sums over its steps."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Totals:
    """Sums over steps and ranks; every mean in a log is one division of these."""

    rows: float = 0.0
    loss_sum: float = 0.0
    tokens: float = 0.0
    computed_tokens: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    """Time in the steps themselves; of one that was begun ahead, from the end of the one before, or of
    a checkpoint in between."""

    @property
    def reviews_per_s(self) -> float:
        """Reviews that were trained on in a second."""
        return self.rows / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """The same in tokens, without padding."""
        return self.tokens / self.seconds

    @property
    def padding(self) -> float:
        """Share of padding and filling among the tokens that were computed."""
        return 1 - self.tokens / max(1.0, self.computed_tokens)

    def add(self, part: "Totals") -> None:
        """Add the sums over other steps."""
        for name in asdict(part):
            setattr(self, name, getattr(self, name) + getattr(part, name))


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps that are done."""
    eval_due: bool = False
    """The evaluation that belongs to the last step is not done yet."""
    split: int = 1
    """Every micro-batch is cut into so many, because it did not fit into memory whole."""
    overall: Totals = field(default_factory=Totals)
    recent: Totals = field(default_factory=Totals)
    """Sums since the last line in the log; not yet part of `overall`."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Make it of what `dataclasses.asdict` made of it."""
        totals = {name: Totals(**values[name]) for name in ("overall", "recent")}
        return cls(**(values | totals))
