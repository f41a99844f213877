"""`tnadapt plan`: `tnadapt.plan` for a model that is known by its configuration alone."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnadapt.costs import Costs
from tnadapt.factorizations import Factorization
from tnadapt.planning import Plan, plan

__all__ = ["run"]


def run(options: argparse.Namespace) -> str:
    """The plan as text or JSON."""
    factorization = chosen_factorization(options)
    made = plan(lora_model(options.model, options.targets, options.rank), factorization, options.top_n)
    costs = made.costs(
        ranks=options.ranks,
        engine=options.engine,
        shard=options.shard,
        tokens_per_step=options.tokens_per_step,
        decompose_rate=None if options.decompose_gflops is None else options.decompose_gflops * 1e9,
    )
    return json.dumps(as_data(made, factorization, costs), indent=2) if options.json else f"{made}\n\n{costs}"


def chosen_factorization(options: argparse.Namespace) -> Factorization:
    """What the options describe.

    Raises:
        ValueError: an unknown factorization or setting, or settings that mean nothing.
    """
    given = {
        "order": options.order,
        "expansion": options.expansion,
        "sites": None if options.sites is None else _sites(options.sites),
        "max_bond": options.max_bond,
        "max_rank": options.max_rank,
        "rank": options.components,
        "gauge": options.gauge,
        "backend": options.backend,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    text = options.factorization
    if not text.lstrip().startswith("{"):
        return Factorization.from_dict({"type": text, **settings})
    try:
        described = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--factorization {text!r} is not JSON ({error})") from error
    twice = sorted(settings.keys() & described.keys())
    if twice:
        raise ValueError(f"{twice[0]} is given twice, as an option and in --factorization; drop one")
    return Factorization.from_dict({**described, **settings})


def _sites(text: str) -> list[list[int]]:
    try:
        sites = [[int(number) for number in site.split("x")] for site in text.split(",")]
    except ValueError:
        sites = []
    if not sites or any(len(site) != 2 for site in sites):
        raise ValueError(
            f"--sites {text!r}: give rows x columns of each site with commas between, such as 64x2,1x1,64x4"
        )
    return sites


def lora_model(model: str, targets: str, rank: int) -> nn.Module:
    """The model of a configuration with LoRA on the meta device, so that it takes no memory.

    Raises:
        ImportError: transformers or PEFT is not installed.
        ValueError: there is no configuration, or PEFT cannot give the model such adapters.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise ImportError(
            "planning from a configuration needs transformers and peft: pip install 'tnadapt[transformers]'"
        ) from error
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give a model's folder, its config.json, or a hub id")
    if path.suffix == ".json" and not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        config = transformers.AutoConfig.from_pretrained(str(path) if path.exists() else model)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{model!r} has no configuration that transformers can read: {first}") from error
    if rank < 1:
        raise ValueError(f"--rank {rank} must be at least 1")
    names: str | list[str] = (
        "all-linear" if targets == "all-linear" else [name.strip() for name in targets.split(",") if name.strip()]
    )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = _base(transformers, config)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=names), low_cpu_mem_usage=True)
    assert isinstance(adapted, nn.Module)
    return adapted


def _base(transformers: Any, config: Any) -> Any:
    """The model that the configuration names, or the usual one of its type where it names none."""
    for name in config.architectures or ():
        known = getattr(transformers, name, None)
        if known is not None:
            return known(config)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        kind = getattr(transformers, auto)
        if type(config) in kind._model_mapping:
            return kind.from_config(config)
    raise ValueError(f"transformers has no model for a configuration of type {config.model_type!r}")


def as_data(made: Plan, factorization: Factorization, costs: Costs) -> dict[str, Any]:
    """The plan and its costs as JSON data."""
    return {
        "factorization": factorization.to_dict(),
        "lora_parameters": made.lora_parameters,
        "trained_parameters": made.trained_parameters,
        "costs": costs.as_data(),
        "rows": [
            {
                "group": row.group,
                "matrices": row.count,
                "expanded": row.expanded,
                "shape": list(row.structure.shape),
                "core_shapes": [list(shape) for shape in row.structure.core_shapes],
                "parameters": row.structure.num_parameters,
                "growth": row.structure.expansion,
                "exact": row.structure.exact,
            }
            for row in made.rows
        ],
        "skipped": [{"name": one.name, "reason": one.reason} for one in made.skipped],
        "advice": list(made.advice),
    }
