"""The methods that the recipes compare. Each is one entry; a new one is added here and nowhere else.

The table imports neither torch nor PEFT: its names are choices of the command line. What an entry needs is imported when the
method is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.config import Config
    from tnadapt import Factorization, Scheduler


@dataclass(frozen=True)
class Over:
    """How LoRA-Over trains: through which factorization, and which matrices it expands when.

    ``choice`` is ``all`` (every matrix from step 0), ``predefined`` (MPO_P: from step 0 those that an ablation of a trained
    plain LoRA found important), ``runtime`` (MPO_R: in rounds, by importance) or ``random`` (from step 0 as many as those have, drawn
    by the seed: what a choice by importance is compared with).
    """

    factorization: str
    choice: str = "all"
    which: str | None = None
    """With ``all``: a pattern of the names of the matrices that are expanded, in place of every one."""
    weights: bool = False
    """Expand the weights of the layers that ``--targets`` means themselves, and not LoRA's matrices."""
    sites: Callable[[int, int], tuple[tuple[int, int], ...]] | None = None
    """The sites of an MPO for rows and columns of a matrix, in place of those that the options ask for."""

    def make_factorization(self, config: Config, shapes: Iterable[tuple[int, int]] = ()) -> Factorization:
        """The factorization that the options ask for, or else the method's own.

        Args:
            config: the options.
            shapes: of the matrices that have cores; ``sites`` needs them.
        """
        from tnadapt import CP, MPO, SVD, Tucker

        if self.sites is not None:
            if config.factorization or config.expansion is not None:
                given = "--factorization" if config.factorization else "--expansion"
                raise ValueError(f"{given} is given: {config.method} has a structure of its own; leave the option out")
            own = {shape: self.sites(*shape) for shape in shapes}
            return MPO(sites=own or None, order=2, gauge=config.gauge, backend=config.backend)
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
        makers: dict[str, Callable[..., Factorization]] = {"mpo": MPO, "tucker": Tucker, "cp": CP}
        return makers[kind](**settings)

    def make_scheduler(self, config: Config, steps: int, scores: Mapping[str, float] | None = None) -> Scheduler:
        """What chooses the matrices to expand in a run of so many ``steps``; ``predefined`` takes the ``scores`` of the ablation,
        ``random`` takes random ones."""
        from tnadapt import LossAblation, Static, TaylorRuntime

        if self.choice == "runtime":
            return TaylorRuntime(top_n=config.top_n, split=config.split, every=config.every)
        if self.choice in ("predefined", "random"):
            assert scores is not None
            return LossAblation(scores, top_n=config.top_n)
        fold_after = max(1, round(config.fold_after * steps)) if config.fold_after else None
        refresh_every = max(1, round(steps / (config.refreshes + 1))) if config.refreshes else None
        return Static(config.which or self.which, fold_after, refresh_every)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: PEFT's LoRA with AdamW where nothing else is said."""

    label: str
    adapter: str | None = "LoraConfig"
    """PEFT's configuration class; None trains every weight of the model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of that class, beyond rank, alpha and target modules."""
    equal_parameters: bool = False
    """Take the rank at which LoRA trains as many numbers as LoRA-Over-MPO_R."""
    b_ratio: float | None = None
    """LoRA+: the rate of B over that of A."""
    gradient_init: str = ""
    """LoRA-GA: ``authors`` or ``peft``, whose initialization from a gradient is taken."""
    changes_base: bool = False
    """The initialization takes the adapter's product out of the base weight, so that the adapter alone does not say it all."""
    over: Over | None = None
    """LoRA-Over: what trains through tensor networks."""
    optimizer: str = "adamw"
    """``adamw``, ``riemannian`` (AdamW behind PEFT's preconditioner), ``rite`` (LoRA-RITE) or ``muon`` (torch's, for the LoRA pairs)."""
    generated: bool = False
    """OP-LoRA: an MLP for each layer writes the pair and is dropped after training."""
    rescaled: bool = False
    """α-LoRA: the rows of the frozen weights are scaled too."""
    tensor_train: bool = False
    """TT-LoRA: the update itself is a tensor train, with ``--rank`` as its rank; no adapter of PEFT's."""

    @property
    def clips(self) -> bool:
        """Whether the optimizer clips gradients itself. LoRA-RITE does, free of how a pair shares its product.

        The norm of its raw gradients says nothing, as it grows with A where B is small, and its authors clip none.
        """
        return self.optimizer == "rite"

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
        if self.optimizer == "rite" and find_spec("pytorch_optimizer") is None:
            raise ValueError(
                f"--method is {config.method}, which needs the package pytorch_optimizer: pip install pytorch_optimizer"
            )


METHODS = {
    "full": Method("Full fine-tuning", adapter=None),
    "opf": Method("OPF", adapter=None, over=Over("mpo", weights=True)),
    "lora": Method("LoRA"),
    "lora-equal": Method("LoRA, equal parameters", equal_parameters=True),
    "pissa": Method("PiSSA", settings={"init_lora_weights": "pissa"}, changes_base=True),
    "rslora": Method("rsLoRA", settings={"use_rslora": True}),
    # 16 is the ratio of the LoRA+ paper (arXiv:2402.12354) and of GoRA's runs
    "lora+": Method("LoRA+", b_ratio=16.0),
    "olora": Method("OLoRA", settings={"init_lora_weights": "olora"}, changes_base=True),
    # PEFT multiplies B by the gradient's singular values and scales B alone; the authors scale bare singular vectors of both
    "lora-ga": Method("LoRA-GA", settings={"use_rslora": True}, gradient_init="authors", changes_base=True),
    "lora-ga-peft": Method(
        "LoRA-GA (PEFT)",
        settings={"use_rslora": True, "init_lora_weights": "lora_ga"},
        gradient_init="peft",
        changes_base=True,
    ),
    "dora": Method("DoRA", settings={"use_dora": True}),
    "adalora": Method("AdaLoRA", adapter="AdaLoraConfig"),
    "loha": Method("LoHa", adapter="LoHaConfig"),
    "lokr": Method("LoKr", adapter="LoKrConfig"),
    "tt-lora": Method("TT-LoRA", adapter="TTLoraLinear", tensor_train=True),
    "alpha-lora": Method("α-LoRA", rescaled=True),
    "deep-lora": Method("Deep LoRA", over=Over("mpo", which=r"\.A$", sites=lambda rows, cols: ((rows, 1), (1, cols)))),
    "op-lora": Method("OP-LoRA", generated=True),
    "riemannian": Method("Riemannian LoRA", optimizer="riemannian"),
    "lora-rite": Method("LoRA-RITE", optimizer="rite"),
    "muon": Method("LoRA with Muon", optimizer="muon"),
    "lora-over-svd": Method("LoRA-Over-SVD", over=Over("svd")),
    "lora-over-mpo": Method("LoRA-Over-MPO", over=Over("mpo")),
    "lora-over-mpo-p": Method("LoRA-Over-MPO_P", over=Over("mpo", "predefined")),
    "lora-over-mpo-r": Method("LoRA-Over-MPO_R", over=Over("mpo", "runtime")),
    "lora-over-mpo-random": Method("LoRA-Over-MPO, random choice", over=Over("mpo", "random")),
    "lora-over-tucker": Method("LoRA-Over-Tucker", over=Over("tucker")),
    "lora-over-cp": Method("LoRA-Over-CP", over=Over("cp")),
}
