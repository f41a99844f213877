"""What a recipe is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.benchmark import Benchmark, Record
from support.config import Config, Grids, Rates
from support.elsewhere import TunedLora

__all__ = ["Recipe", "Record"]


@dataclass(frozen=True, eq=False)
class Recipe:
    """A task, its settings and what is known of it. The harness trains and evaluates every method on it alike."""

    path: Path
    """The recipe's file."""
    description: str
    config: type[Config]
    presets: Mapping[str, Any]
    """Configurations by name; ``laptop`` runs anywhere."""
    rates: Mapping[str, Rates]
    """Tuned learning rates by preset."""
    load: Callable[[Any], tuple[list[Record], list[Record]]]
    """The records to train on (more than needed, as long ones are left out) and those to evaluate on."""
    prompt: Callable[[Record], str]
    """What the model reads in training."""
    answer: Callable[[Record], str]
    """What it learns to write after the prompt; the loss is on this and on the end-of-sequence token."""
    benchmark: Benchmark
    """How the trained model is examined."""
    choices: Callable[[Any], Sequence[str]] | None = None
    """All answers that there are, for a configuration; a model that is an encoder alone chooses among them, and needs them."""
    default_methods: Sequence[str] = ("lora", "lora-over-mpo-r")
    embedded: str = "model"
    """The folder under ``recipes/embedded`` of the model that ``embedded`` stands for."""
    several: Sequence[str] = ("method",)
    """Fields of which the command line takes several values; each combination is a run."""
    paper: Callable[[Any], Mapping[str, str]] = lambda config: {}
    """The paper's figures in % by label, for a configuration that they can stand beside."""
    elsewhere: Callable[[Any], Sequence[TunedLora]] = lambda config: ()
    """What other papers measured with LoRA at a rate that they tuned, for such a configuration."""
    grids: Mapping[str, Grids] = field(default_factory=dict)
    """The rates that were tried by preset and method."""

    @property
    def name(self) -> str:
        """What run folders and committed tables are called by."""
        return self.path.stem

    @property
    def embedded_model(self) -> Path:
        """The folder of the model that ``embedded`` stands for."""
        return self.path.parent / "embedded" / self.embedded

    def title(self, config: Config) -> str:
        """What the methods of one table are trained on: the values of ``several`` but the method, and the data."""
        return " ".join([*self._fields(config), config.data])

    def table_name(self, config: Config) -> str:
        """What the committed table over seeds is called that holds the results of ``config``."""
        return "-".join([self.name, config.preset, *self._fields(config)])

    def _fields(self, config: Config) -> list[str]:
        return [str(getattr(config, name)) for name in self.several if name != "method"]

    def resolve(self, config: Config) -> Any:
        """``config`` after its checks, with its learning rates.

        Raises:
            ValueError: for what cannot work, before anything is loaded.
        """
        if config.preset not in self.presets:
            raise ValueError(f"--preset is {config.preset!r}: choose one of {', '.join(self.presets)}")
        config.check()
        self.benchmark.check(config)
        config = config.completed()
        return config.with_rates(self.presets, self.rates, f"recipes/{self.path.name}")
