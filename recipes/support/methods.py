"""The methods that the recipes compare. Each is one entry; a new one is added here and nowhere else.

The table imports neither torch nor PEFT: its names are choices of the command line. What an entry needs is imported when the
method is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.config import Config
    from tnadapt import Factorization, Scheduler


@dataclass(frozen=True)
class Over:
    """How LoRA-Over trains: through which factorization, and which matrices it expands when.

    ``choice`` is ``all`` (every matrix from step 0) or ``runtime`` (MPO_R: in rounds, by importance).
    """

    factorization: str
    choice: str = "all"

    def make_factorization(self, config: Config) -> Factorization:
        """The factorization that the options ask for, or else the method's own."""
        from tnadapt import CP, MPO, SVD, Tucker

        kind = config.factorization or self.factorization
        if kind == "svd" and config.expansion is not None:
            raise ValueError(
                f"--expansion is {config.expansion}: an SVD has one structure only; take --factorization mpo"
            )
        if kind == "svd":
            return SVD(gauge=config.gauge, backend=config.backend)
        settings: dict[str, Any] = {"backend": config.backend}
        if config.expansion is None:
            settings["order"] = config.order
        else:
            settings["expansion"] = config.expansion
        # the default gauge stands for that of each factorization, which CP calls otherwise
        if not (kind == "cp" and config.gauge == "svd"):
            settings["gauge"] = config.gauge
        return {"mpo": MPO, "tucker": Tucker, "cp": CP}[kind](**settings)

    def make_scheduler(self, config: Config) -> Scheduler:
        """What chooses the matrices to expand."""
        from tnadapt import Static, TaylorRuntime

        if self.choice == "runtime":
            return TaylorRuntime(top_n=config.top_n, split=config.split, every=config.every)
        return Static()


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: plain LoRA where nothing else is said."""

    label: str
    over: Over | None = None

    @property
    def two_rates(self) -> bool:
        """Whether some matrices have cores and some do not, so that both rates count."""
        return self.over is not None and self.over.choice != "all"

    def check(self, config: Config) -> None:
        """Refuse options that do not go together.

        Raises:
            ValueError: with the way out.
        """
        if self.over is not None:
            try:
                self.over.make_factorization(config)
            except ImportError as error:  # the library of a backend
                raise ValueError(str(error)) from error


METHODS = {
    "lora": Method("LoRA"),
    "lora-over-svd": Method("LoRA-Over-SVD", over=Over("svd")),
    "lora-over-mpo": Method("LoRA-Over-MPO", over=Over("mpo")),
    "lora-over-mpo-r": Method("LoRA-Over-MPO_R", over=Over("mpo", "runtime")),
}
