"""Where a run stands, and the learning rate there: phases one after another, each warm-up, stable, decay (WSD)."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from hysparse.choices import DecayShape
from hysparse.config import PhaseConfig


@dataclass(frozen=True)
class Progress:
    """The whole state of the schedule and of the data. Samples count within a phase: its length may differ."""

    step: int = 0  # optimizer steps of the run
    tokens: int = 0  # tokens of the run
    phase: int = 0  # index of the phase that the next step belongs to
    samples: int = 0  # sequences consumed in that phase

    def after(self, phase: PhaseConfig) -> "Progress":
        """One optimizer step later; the phase ends with the step that reaches its budget."""
        samples, tokens = self.samples + phase.global_batch, self.tokens + phase.tokens_per_step
        if samples * phase.sequence_length >= phase.tokens:
            return Progress(self.step + 1, tokens, self.phase + 1, 0)
        return replace(self, step=self.step + 1, tokens=tokens, samples=samples)

    def as_dict(self) -> dict:
        return asdict(self)


def steps(phases: list[PhaseConfig], start: Progress, max_steps: int | None = None) -> Iterator[Progress]:
    """The position before each remaining step, of `max_steps` in all if that is fewer."""
    while start.phase < len(phases) and (max_steps is None or start.step < max_steps):
        yield start
        start = start.after(phases[start.phase])


def learning_rate(phase: PhaseConfig, samples: int) -> float:
    """Of the step that follows `samples` sequences of the phase; positions are counted at the step's end.

    Linear from 0 to the peak over `warmup_tokens`, stable, and over the last `decay_tokens` down to the minimum.
    """
    tokens = samples * phase.sequence_length + phase.tokens_per_step
    if tokens < phase.warmup_tokens:
        return phase.learning_rate * tokens / phase.warmup_tokens
    left = max(phase.tokens - tokens, 0)
    if left >= phase.decay_tokens:
        return phase.learning_rate
    progress = 1 - left / phase.decay_tokens  # 0 … 1
    remaining = {
        DecayShape.linear: 1 - progress,
        DecayShape.cosine: (1 + math.cos(math.pi * progress)) / 2,
        DecayShape.sqrt: 1 - math.sqrt(progress),
    }[phase.decay_shape]
    return phase.minimum_learning_rate + remaining * (phase.learning_rate - phase.minimum_learning_rate)
