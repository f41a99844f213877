"""What is changed by a mutation run, and the tests that run on a change."""

from __future__ import annotations

#: modules and folders that are mutated
MUTATED = (
    *("tnadapt/planning.py", "tnadapt/assignment.py", "tnadapt/finders.py", "tnadapt/matrices.py", "tnadapt/state.py"),
    *("tnadapt/lora_over.py", "tnadapt/adapter", "tnadapt/backends", "tnadapt/factorizations", "tnadapt/schedulers"),
    "tnadapt/engine",
)

#: what is left out, and why
LEFT_OUT = {
    "tnadapt/__init__.py": "names only",
    "tnadapt/card.py": "words and pictures",
    "tnadapt/cli": "words and pictures",
    "tnadapt/costs.py": "tested against counts and measured memory",
    "tnadapt/counting.py": "tested against counts and measured memory",
    "tnadapt/integrations": "its tests train with other libraries, and take minutes",
    "tnadapt/pictures.py": "words and pictures",
    "tnadapt/registry.py": "names only",
    "tnadapt/row_rescale.py": "a method beside LoRA-Over",
    "tnadapt/testing.py": "is a test itself",
    "tnadapt/tt_lora.py": "a method beside LoRA-Over",
}


def _files(folder: str, names: str) -> list[str]:
    return [f"tests/{folder}/test_{name}.py" for name in names.split()]


_RANKS = _files("distributed", "fsdp ddp ddp_and_fsdp agreement sharded_cores offload refused checkpoint")

#: the tests that mutants of a module run, those that find most first; the longest prefix of its path counts
TESTS = {
    "tnadapt/planning.py": ["tests/test_planning.py", "tests/engine/test_mixed.py"],
    "tnadapt/assignment.py": ["tests/engine/test_mixed.py"],
    "tnadapt/finders.py": ["tests/test_finders.py", "tests/engine/test_mixed.py"],
    "tnadapt/matrices.py": ["tests/test_matrices.py", "tests/engine/test_edges.py"],
    "tnadapt/state.py": _files("engine", "state edges matched"),
    "tnadapt/lora_over.py": [
        *_files("engine", "edges state bad_input steps mixed"),
        *("tests/test_public_api.py", "tests/integrations/test_own_optimizer.py"),
    ],
    "tnadapt/adapter": ["tests/test_adapter.py", "tests/test_adapter_models.py", "tests/test_row_rescale.py"],
    "tnadapt/backends": _files(
        "factorizations", "kernels backends_agree precision gradients round_trip backend_table plugins"
    ),
    "tnadapt/schedulers": [
        *("tests/test_schedulers.py", "tests/test_loss_ablation.py"),
        *_files("distributed", "fsdp offload"),
    ],
    "tnadapt/factorizations": _files(
        "factorizations",
        "gauges structure layout kernels bad_input truncation zero_start precision gradients batches round_trip "
        "tensor_ring dicts",
    ),
    "tnadapt/engine": [
        *_files(
            "engine",
            "steps edges matched mixed cohorts coupling handover scaling bad_input model_untouched state equivalence "
            "factorizations_train",
        ),
        *("tests/test_algorithm2.py", "tests/trust/test_faults.py", "tests/test_public_api.py"),
        *_RANKS,
    ],
}
