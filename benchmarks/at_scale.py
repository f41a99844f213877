"""What training through cores needs at 8B, 70B and 405B parameters, and how far the formulas are from what is measured.

    python benchmarks/at_scale.py             # plans and measurements, minutes; renews docs/scale.md
    python benchmarks/at_scale.py --quick     # smallest sizes, seconds

Plans: `tnadapt.plan` on the meta device, for Llama 3.1 as its configurations are published, with LoRA of rank 16 on every linear
layer and every matrix expanded, on 8, 64 and 512 GPUs.

Measurements: a stack of adapters on 1, 2 and 4 processes over gloo, with DDP and FSDP2. Each process records what torch's
allocator gives out in steps with and without LoraOver; the difference is compared with `plan(...).costs().memory`. The bytes of
the tensors of all collectives of a step are counted and compared with `costs().sent`.

Writes the numbers with their provenance to benchmarks/results/at_scale.json, and the tables between the marks of docs/scale.md.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn
from provenance import environment, read_json, write_json  # first, since it makes the recipes' modules importable
from support.marked import replaced
from support.tables import Table
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm import tqdm

from tnadapt import MPO, LoraOver, OverParamAdapter, plan
from tnadapt.planning import Plan

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "scale.md"

# -- plans ------------------------------------------------------------------------------------------------------------

#: Llama 3.1: hidden size, intermediate size, layers, attention heads; 8 heads of keys and values, 128,256 tokens
MODELS = {
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
RANK, ORDER, GPUS, TOKENS_PER_GPU = 16, 10, (8, 64, 512), 4096
#: Flops in a second that a GPU is taken to reach: bfloat16 in the model, float32 without TF32 in the cores.
MODEL_RATE, CORE_RATE = 4e14, 3e13
#: Flops in a second of a CPU thread that decomposes in float64.
DECOMPOSE_RATE = 1e10


def planned(name: str) -> Plan:
    """Every LoRA matrix of a Llama 3.1 expanded; bfloat16, adapters in float32."""
    import peft
    import transformers

    hidden, wide, layers, heads = MODELS[name]
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        adapted = peft.get_peft_model(
            base, peft.LoraConfig(r=RANK, target_modules="all-linear"), low_cpu_mem_usage=True
        )
    return plan(adapted, MPO(order=ORDER))


def plans(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each model, number of GPUs, and place of the cores."""
    for name in tqdm(names, desc="plans", unit="model"):
        made = planned(name)
        for gpus in GPUS:
            for shard in (False, True):
                costs = made.costs(
                    ranks=gpus,
                    engine="fsdp2",
                    shard=shard,
                    tokens_per_step=gpus * TOKENS_PER_GPU,
                    decompose_rate=DECOMPOSE_RATE,
                )
                assert costs.model_flops is not None
                seconds = costs.flops / CORE_RATE / (costs.model_flops / MODEL_RATE)
                yield {
                    "model": name,
                    "parameters": made.model.frozen_bytes // 2,
                    "lora_parameters": made.lora_parameters,
                    "core_parameters": made.trained_parameters,
                    "time_ratio": seconds,
                    **costs.as_data(),
                }


def gib(count: float) -> str:
    return f"{count / 2**30:,.2f}" if count < 100 * 2**30 else f"{count / 2**30:,.0f}"


def plan_table(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        *("model", "GPUs", "cores on", "frozen model, GiB", "plain LoRA, GiB", "above it, GiB"),
        *("plain LoRA sends, M", "above it, M", "arithmetic", "time"),
    )
    return Table(
        "Plans",
        header,
        [
            (
                row["model"],
                str(row["ranks"]),
                "one rank" if row["shard"] else "all",
                gib(row["base_bytes"]),
                gib(row["plain_lora_bytes"]),
                gib(row["memory_bytes"]["total"]),
                f"{row['sent']['plain'] / 1e6:,.0f}",
                f"{row['sent']['added'] / 1e6:,.0f}",
                f"{row['ratio']:.3%}",
                f"{row['time_ratio']:.2%}",
            )
            for row in rows
        ],
    ).markdown()


def model_table(rows: Sequence[dict[str, Any]]) -> str:
    first = [row for row in rows if row["ranks"] == GPUS[0]]
    lines = []
    for name in dict.fromkeys(row["model"] for row in first):
        whole, dealt = (next(r for r in first if r["model"] == name and r["shard"] is shard) for shard in (False, True))
        lines.append(
            (
                name,
                f"{whole['parameters'] / 1e9:,.1f}",
                f"{whole['lora_parameters'] / 1e6:,.0f}",
                f"{whole['core_parameters'] / 1e6:,.0f}",
                gib(whole["memory_bytes"]["cores"]),
                f"{whole['expansion']['seconds']:,.0f}",
                f"{dealt['expansion']['seconds']:,.0f}",
            )
        )
    header = ("model", "frozen, 10^9", "LoRA, 10^6", "cores, 10^6", "cores, GiB", "expand, s", f"dealt to {GPUS[0]}, s")
    return Table("Models", header, lines).markdown()


# -- measurements -----------------------------------------------------------------------------------------------------

#: seconds to wait after each collective: what a thread of gloo frees is not recorded, so these threads must let go of its tensors first
PAUSE = 2e-2
#: runs of each, of which the least counts, since a wait may be too short
REPEATS = 3
#: whether the engine can give each matrix an owner
SHARDS = "shard" in inspect.signature(LoraOver).parameters


class Stack(nn.Module):
    """Frozen layers with adapters."""

    def __init__(self, layers: int, width: int, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(width, width), rank) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x)) + x
        return x


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that collectives make or change, without the flags by which ranks agree, which are integers. Waits after
    each of them, see `PAUSE`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it takes itself apart, and comes back with what is really called
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not name.startswith(("c10d::", "_c10d_functional::")):
            return out
        time.sleep(PAUSE)
        if not name.endswith(("wait_tensor", "_wrap_tensor_autograd")):
            tensors = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
            sent = sum(t.nbytes for t in tensors if t.is_floating_point() or t.dtype == torch.uint8)
            self.bytes[name] = self.bytes.get(name, 0) + sent
        return out


def changes(recorded: Any) -> list[int]:
    """Bytes that the allocator gave out (positive) and took back, in order."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def measured(engine: str, how: str, layers: int, width: int) -> dict[str, Any]:
    """What this rank allocates between steps and at most during one, and what is sent in one.

    Args:
        how: `"plain"` for plain LoRA, `"all"` for all cores on every rank, `"one"` for each matrix's cores on one.
    """
    model: nn.Module = Stack(layers, width, RANK)
    if dist.get_world_size() == 1:
        pass
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    model(torch.randn(4, width, generator=torch.Generator().manual_seed(dist.get_rank()))).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gc.collect()
    with Collectives(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as before:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        if how != "plain":
            LoraOver(model, optimizer, MPO(order=ORDER), **({"shard": how == "one"} if SHARDS else {}))
        optimizer.step()
        optimizer.step()
        gc.collect()
    with Collectives() as sent, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as during:
        optimizer.step()
    rest, level, peak = sum(changes(before)), 0, 0
    for change in changes(during):
        level += change
        peak = max(peak, level)
    return {"rest": rest, "peak": rest + peak, "sent": sum(sent.bytes.values()), "collectives": sent.bytes}


def worker(rank: int, world: int, folder: str, ways: Sequence[tuple[str, str]], layers: int, width: int) -> None:
    """One rank; nothing may hold the process group once it is destroyed, as threads of gloo may then abort the process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        found = {}
        for engine, how in ways:
            runs = []
            for _ in range(REPEATS):
                runs.append(measured(engine, how, layers, width))
                gc.collect()
            found[f"{engine} {how}"] = {
                **runs[-1],
                **{what: min(run[what] for run in runs) for what in ("rest", "peak")},
            }
        write_json(Path(folder) / f"rank{rank}.json", found)
        dist.barrier()
    finally:
        gc.collect()
        dist.destroy_process_group()


def measurements(worlds: Sequence[int], layers: int, width: int) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks, engine, and place of the cores."""
    made = plan(Stack(layers, width, RANK), MPO(order=ORDER))
    hows = ("all", "one") if SHARDS else ("all",)
    for world in tqdm(worlds, desc="measurements", unit="world"):
        ways = [(engine, how) for engine in ("ddp", "fsdp2")[: 1 if world == 1 else 2] for how in ("plain", *hows)]
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(worker, (world, folder, ways, layers, width), nprocs=world)  # type: ignore[no-untyped-call]
            ranks = [read_json(Path(folder) / f"rank{rank}.json") for rank in range(world)]
        for engine, how in ways:
            if how == "plain":
                continue
            costs = made.costs(ranks=world, engine=engine, shard=how == "one", decompose_rate=1e9)
            above = {
                what: max(found[f"{engine} {how}"][what] - found[f"{engine} plain"][what] for found in ranks)
                for what in ("rest", "peak")
            }
            yield {
                "ranks": world,
                "engine": engine,
                "cores_on": how,
                "peak_bytes": above["peak"],
                "rest_bytes": above["rest"],
                "formula_bytes": costs.memory.total,
                "ratio": above["peak"] / costs.memory.total,
                "sent": max(found[f"{engine} {how}"]["sent"] for found in ranks),
                "formula_sent": costs.sent.added_bytes,
                "collectives": ranks[0][f"{engine} {how}"]["collectives"],
            }


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "ranks",
        "engine",
        "cores on",
        "measured, MiB",
        "formula, MiB",
        "ratio",
        "sent, bytes",
        "formula, bytes",
    )
    return Table(
        "Measured",
        header,
        [
            (
                str(row["ranks"]),
                "–" if row["ranks"] == 1 else {"ddp": "DDP", "fsdp2": "FSDP2"}[row["engine"]],
                {"all": "all", "one": "one rank"}[row["cores_on"]],
                f"{row['peak_bytes'] / 2**20:.2f}",
                f"{row['formula_bytes'] / 2**20:.2f}",
                f"{row['ratio']:.3f}",
                f"{row['sent']:,}",
                f"{row['formula_sent']:,}",
            )
            for row in rows
        ],
    ).markdown()


# -- the page ---------------------------------------------------------------------------------------------------------


def renewed(path: Path, blocks: dict[str, str]) -> str:
    """The page with these blocks between their marks."""
    page = path.read_text(encoding="utf-8")
    for name, text in blocks.items():
        page = replaced(page, f"<!-- {name} -->", f"<!-- /{name} -->", text, path)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one and two ranks, small layers")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="renewed between its marks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = list(plans(["8B"] if arguments.quick else list(MODELS)))
    sizes = (2, 96) if arguments.quick else (6, 768)
    checked = list(measurements((1, 2) if arguments.quick else (1, 2, 4), *sizes))
    blocks = {"models": model_table(found), "plans": plan_table(found), "measured": measured_table(checked)}
    print("\n\n".join(blocks.values()))
    settings = {
        "rank": RANK,
        "order": ORDER,
        "tokens_per_gpu": TOKENS_PER_GPU,
        "model_rate": MODEL_RATE,
        "core_rate": CORE_RATE,
        "decompose_rate": DECOMPOSE_RATE,
        "measured": {"layers": sizes[0], "width": sizes[1], "optimizer": "AdamW, fused"},
    }
    result = {"settings": settings, "plans": found, "measurements": checked, "provenance": environment(HERE)}
    write_json(arguments.output / "at_scale.json", result)
    arguments.page.write_text(renewed(arguments.page, blocks), encoding="utf-8")
    assert all(math.isfinite(row["ratio"]) for row in checked)


if __name__ == "__main__":
    main()
