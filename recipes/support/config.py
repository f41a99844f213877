"""The settings of a run that the recipes share; every field is an option of the command line.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from support import quantized
from support.methods import METHODS

EMBEDDED = "embedded"
FACTORIZATIONS = ("svd", "mpo", "tucker", "cp")
BACKENDS = ("torch", "opt_einsum", "tensorly", "tensornetwork")

#: (rate of the LoRA matrices, rate of the cores; None: the cores take their matrix's), by method
Rates = Mapping[str, tuple[float, float | None]]

#: the rates of the LoRA matrices that were tried when those of `Rates` were tuned, by method
Grids = Mapping[str, Sequence[float]]


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a configuration, with the line that ``--help`` shows and the values that are allowed."""
    return dataclasses.field(default=default, metadata={"help": text} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    preset: str = option(
        "laptop", "laptop: small and offline; paper and paper-llama2: the settings of LoRA-Over's paper"
    )
    method: str = option("lora", "what is trained", tuple(METHODS))
    model: str = option(EMBEDDED, "base model: embedded, a local folder or a hub id")
    data: str = option(EMBEDDED, "what to train on: embedded, a local folder or file, or a hub id")
    eval_split: str = option("test", "records to evaluate on; choose rates on validation", ("validation", "test"))
    train_size: int = option(3200, "training examples")
    eval_size: int = option(500, "examples to evaluate on")
    seed: int = option(0, "seed of the adapter's initialization, of the order of the data and of sampling")
    max_length: int = option(512, "longest training example in tokens; longer ones are left out, not cut")
    batch: int = option(32, "training examples per optimizer step")
    micro_batch: int = option(32, "training examples at once on the device; divides the batch")
    epochs: int = option(1, "passes over the training examples")
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs have")
    lr: float | None = option(None, "learning rate of the LoRA matrices; None: the one tuned for the preset's model")
    core_lr: float | None = option(
        None, "learning rate of the cores; None: the one tuned for the preset's model, or that of --lr"
    )
    weight_decay: float = option(5e-4, "weight decay of AdamW")
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    rank: int = option(8, "LoRA's rank")
    alpha: int = option(16, "LoRA's alpha; the adapter is scaled by alpha / rank")
    targets: str = option(
        "q_proj,k_proj,v_proj,o_proj", "names of linear layers that get adapters, with commas, or all-linear"
    )
    order: int = option(10, "order of the factorization: cores of an MPO")
    gauge: str = option(
        "svd", "gauge of the factorization, such as svd, balanced or random; see docs/factorizations/mpo.md"
    )
    top_n: int = option(3, "matrices to expand in each group")
    split: int = option(3, "rounds in which MPO_R expands them")
    every: int = option(10, "steps between two rounds of MPO_R")
    dtype: str = option("float32", "dtype of the base model", ("float32", "bfloat16"))
    activation_checkpointing: bool = option(False, "compute activations again in the backward pass, to save memory")
    max_new_tokens: int = option(80, "longest answer in tokens")
    eval_batch: int = option(125, "answers that are generated at once")
    save_every: int = option(25, "steps between two checkpoints")
    factorization: str | None = option(None, "factorization in place of the method's own", FACTORIZATIONS)
    expansion: float | None = option(
        None, "how many times the parameters of a matrix its cores have, in place of --order"
    )
    backend: str = option("torch", "library that contracts and decomposes", BACKENDS)
    matched: bool = option(
        False, "scale each step through cores to the length of the step that the optimizer would take without them"
    )
    which: str | None = option(None, "expand only the matrices whose names match this regular expression; None: all")
    fold_after: float = option(
        0.0, "share of the steps after which training goes on as plain LoRA; 0: cores to the end"
    )
    refreshes: int = option(0, "how many times in a run all matrices are unfolded anew")
    wrong_answers: float = option(0.0, "share of the training examples whose answers are exchanged among them")
    quantize: str = option(
        quantized.NONE, "base model in four bits, under an adapter of full precision", quantized.CHOICES
    )
    stop_after: int = option(0, "end after that many steps of the schedule, evaluate and report; 0: all steps")
    shard: bool = option(
        False, "where several ranks train, deal the cores out over them instead of copying all to each"
    )

    #: Fields that the scores of the base model depend on.
    DECIDE_BASE: ClassVar[tuple[str, ...]] = (
        *("model", "data", "eval_split", "eval_size", "dtype", "max_new_tokens", "eval_batch", "quantize"),
    )
    #: Fields that are no part of a run's identity while they have their default: runs from before they came stay valid.
    LATER: ClassVar[tuple[str, ...]] = (
        *("factorization", "expansion", "backend", "matched", "which", "fold_after", "refreshes", "wrong_answers"),
        *("quantize", "stop_after", "shard"),
    )
    #: The smallest value of whole numbers where that is not 1, and the numbers with decimals that may be 0.
    LEAST: ClassVar[Mapping[str, int]] = {"order": 2, "max_steps": 0, "stop_after": 0, "seed": 0, "refreshes": 0}
    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("weight_decay", "clip", "temperature", "fold_after", "wrong_answers")
    #: Fields that say how answers are scored. They are no part of a run's identity: its answers can be scored later.
    SCORING: ClassVar[tuple[str, ...]] = ()
    #: Fields that name data.
    PLACES: ClassVar[tuple[str, ...]] = ("data",)

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ValueError: names the option, its value and the way out.
        """
        check_fields(self)
        if self.batch % self.micro_batch:
            raise ValueError(f"--micro-batch is {self.micro_batch}: it must divide --batch, which is {self.batch}")
        if self.wrong_answers > 1:
            raise ValueError(f"--wrong-answers is {self.wrong_answers:g}: give a share of at most 1")
        over = METHODS[self.method].over
        if self.matched and over is None:
            raise ValueError(
                f"--matched is given, and {self.method} has no cores; leave it out, or take a lora-over method"
            )
        chosen = [name for name in ("which", "fold_after", "refreshes") if getattr(self, name) not in (None, 0)]
        if chosen and (over is None or over.choice != "all" or over.which):
            given = "--" + chosen[0].replace("_", "-")
            raise ValueError(
                f"{given} is given, and {self.method} does not expand every matrix from the first step; leave it out, or take "
                "another lora-over method"
            )
        if self.which is not None:
            try:
                re.compile(self.which)
            except re.error as error:
                raise ValueError(f"--which is {self.which!r}, which is no regular expression: {error}") from error
        if self.fold_after >= 1:
            raise ValueError(f"--fold-after is {self.fold_after:g}: give a share of the steps below 1")
        if 0 < self.max_steps <= self.refreshes:
            raise ValueError(
                f"--refreshes is {self.refreshes}, and --max-steps {self.max_steps}: a run has fewer steps to refresh between than that"
            )
        if self.matched and self.core_lr is not None:
            raise ValueError(
                f"--matched is given, so --core-lr {self.core_lr:g} would mean nothing; leave one of them out"
            )
        check_place("model", self.model, files=False)
        for name in self.PLACES:
            check_place(name.replace("_", "-"), getattr(self, name) or EMBEDDED, files=True)
        METHODS[self.method].check(self)
        quantized.check(self)

    def completed(self) -> Self:
        """This configuration with what follows from its other fields."""
        return self

    def with_rates(self, presets: Mapping[str, Self], rates: Mapping[str, Rates], script: str) -> Self:
        """This configuration with its learning rates: those given, or those tuned for the preset's model.

        Args:
            presets: the recipe's presets by name.
            rates: tuned rates by preset.
            script: the recipe's file, for the command that tunes.

        Raises:
            ValueError: no rate is given, and none was tuned for this method on this model; says how to tune.
        """
        if self.lr is not None:
            return self
        tuned = rates.get(self.preset, {}).get(self.method) if self.model == presets[self.preset].model else None
        if tuned is None:
            raise ValueError(
                f"--lr is not given, and no rate of {self.method} was tuned on {self.model} in this recipe; give one, or tune it: "
                f"{self.tuning_command(presets[self.preset], script)}"
            )
        lr, core_lr = tuned
        return dataclasses.replace(self, lr=lr, core_lr=None if self.matched else self.core_lr or core_lr)

    def tuning_command(self, preset: Self, script: str) -> str:
        """The command line that finds this method's rate, with every option that differs from the preset."""
        words = ["python", "recipes/ablate.py", "tune", "--recipe", script, "--methods", self.method]
        words += ["--lrs", *TUNING_GRID, "--extend", "--eval-split", "validation"]
        own = ("method", "lr", "core_lr", "eval_split", "seed", *self.SCORING)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in own and (field.name == "preset" or value != getattr(preset, field.name)):
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(words)

    def decodings(self) -> dict[str, tuple[float, float] | None]:
        """How the model answers: temperature and top-p, or None for greedy, by what the figures' names begin with."""
        return {"": None}

    def scoring(self) -> dict[str, Any]:
        """How answers are scored."""
        return {name: getattr(self, name) for name in self.SCORING}

    def settings(self) -> dict[str, Any]:
        """What tells one run from another."""
        default = {field.name: field.default for field in dataclasses.fields(self)}
        fields = dataclasses.asdict(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in self.SCORING and (name not in self.LATER or value != default[name])
        }

    def base(self) -> Self:
        """A configuration with only those fields that the scores of the base model depend on."""
        return dataclasses.replace(type(self)(), **{name: getattr(self, name) for name in self.DECIDE_BASE})


#: Steps of 10^(1/4) around what LoRA is usually trained with.
TUNING_GRID = ("1e-4", "1.78e-4", "3.16e-4", "5.62e-4", "1e-3", "1.78e-3", "3.16e-3")


@dataclass(frozen=True)
class GenerationConfig(Config):
    """A configuration of recipes whose model writes free text."""

    test_data: str | None = option(None, "where the examples to evaluate on come from; None: from --data")
    temperature: float = option(0.0, "temperature of sampling; 0: greedy")
    top_p: float = option(1.0, "sample among the most probable tokens whose probabilities add up to this")

    greedy_beside: bool = option(False, "if answers are sampled, answer greedily as well, with a score of its own")

    DECIDE_BASE: ClassVar[tuple[str, ...]] = (*Config.DECIDE_BASE, "test_data", "temperature", "top_p", "greedy_beside")
    LATER: ClassVar[tuple[str, ...]] = (*Config.LATER, "greedy_beside")
    PLACES: ClassVar[tuple[str, ...]] = ("data", "test_data")

    def check(self) -> None:
        if self.top_p > 1:
            raise ValueError(f"--top-p is {self.top_p}: give a share of at most 1")
        super().check()

    def decodings(self) -> dict[str, tuple[float, float] | None]:
        if not self.temperature:
            return {"": None}
        return {"": (self.temperature, self.top_p)} | ({"greedy_": None} if self.greedy_beside else {})


def check_fields(config: Config) -> None:
    """Refuse values outside of a field's choices or bounds.

    Raises:
        ValueError: for the first field that does not fit.
    """
    for field in dataclasses.fields(config):
        value, problem = getattr(config, field.name), ""
        choices = field.metadata.get("choices")
        if choices and value not in choices and value != field.default:
            problem = f"choose one of {', '.join(choices)}"
        elif isinstance(value, int) and not isinstance(value, bool):
            least = config.LEAST.get(field.name, 1)
            problem = "" if value >= least else f"give a whole number of at least {least}"
        elif isinstance(value, float) and field.name in config.MAY_BE_ZERO:
            problem = "" if value >= 0 else "give a number of at least 0"
        elif isinstance(value, float):
            problem = "" if value > 0 else "give a number above 0"
        if problem:
            raise ValueError(f"--{field.name.replace('_', '-')} is {value!r}: {problem}")


def is_hub_id(place: str) -> bool:
    """Whether ``place`` reads like ``owner/name`` and not like the name of a data file."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place)) and not place.endswith(
        (".jsonl", ".json", ".tsv", ".csv")
    )


def check_place(name: str, place: str, files: bool) -> None:
    """Refuse a model or data that cannot be there.

    Raises:
        ValueError: it is neither embedded, nor a folder (or file), nor reads like a hub id.
    """
    path = Path(place).expanduser()
    if place == EMBEDDED or path.is_dir() or (files and path.is_file()) or (is_hub_id(place) and not path.exists()):
        return
    if path.is_file():
        raise ValueError(f"--{name} is {place!r}, which is a file; give the folder of a model, or a hub id")
    what = "folder or file" if files else "folder"
    raise ValueError(f"--{name} is {place!r}: there is no such {what}, and a hub id reads owner/name")
