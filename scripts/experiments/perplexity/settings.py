"""What the perplexity experiment is asked to do."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, PositiveInt

from emt.errors import ConfigError
from emt.model.loading import DEFAULT_MODEL
from experiments.settings import Ascending, MemorySettings, Settings, Text

WINDOW = "window"
FULL = "full"


def _without_topk(memory: dict[str, Any]) -> dict[str, Any]:
    if "topk" in memory:
        raise ConfigError("'topk' is a setting of the experiment. Set topk=[...] instead.")
    return memory


class PerplexitySettings(Settings):
    """What is asked; `configs/experiments/perplexity.yaml` says what each setting means."""

    data: Text
    model: Text = DEFAULT_MODEL
    lengths: Ascending
    window: PositiveInt = 2048
    scored: PositiveInt = 256
    topk: Ascending = [3]
    memory: Annotated[MemorySettings, AfterValidator(_without_topk)] = {}
    full: bool = True
    texts: PositiveInt | None = None
    piece_tokens: PositiveInt | None = None

    def model_post_init(self, _: Any) -> None:
        """Check that every scored token is predicted from one before it."""
        if self.scored >= min(self.window, self.lengths[0]):
            raise ConfigError(
                f"scored ({self.scored}) must be below the window ({self.window}) and every length "
                f"({self.lengths[0]} and up): each token is predicted from one before it."
            )

    def memory_conditions(self) -> dict[str, int]:
        """Return the conditions with a memory: name -> topk."""
        return {f"memory, topk {topk}": topk for topk in self.topk}

    def conditions(self) -> list[str]:
        """Return the names of all conditions."""
        return [WINDOW, *self.memory_conditions(), *([FULL] if self.full else [])]
