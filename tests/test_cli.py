"""The command `tnadapt`, and the pictures that its report is made of."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnadapt import CP, MPO, SVD, LoraOver, OverParamAdapter, Static, TaylorRuntime, TensorRing, Tucker, pictures, plan
from tnadapt.cli import main
from tnadapt.cli.report import bars, names, read_runs

ROOT = Path(__file__).parents[1]


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What the command prints, or says on stderr where it fails."""
    assert main([str(argument) for argument in arguments]) == status
    shown = capsys.readouterr()
    return shown.out if status == 0 else shown.err


class Net(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Trained:
    """A short run and what was recorded of it."""

    def __init__(self, factorization: Any = None, scheduler: Any = None, steps: int = 6, **options: Any) -> None:
        self.model = Net()
        self.before = pictures.spectra(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.over = LoraOver(
            self.model, self.optimizer, factorization or MPO(order=4), scheduler or rounds(), **options
        )
        self.norms: dict[int, dict[str, float]] = {}
        self.curve: list[tuple[int, float]] = []
        x, y = torch.randn(16, 12), torch.randn(16, 12)
        for _ in range(steps):
            loss = (self.model(x) - y).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.norms[self.over.step] = self.over.update_norms()
            self.curve.append((self.over.step, loss.item()))

    def save(self, folder: Path) -> Path:
        """A checkpoint: the state of the optimizer and the weights, under the model's own names."""
        folder.mkdir(exist_ok=True)
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(self.model.state_dict(), folder / "pytorch_model.bin")
        return folder


def rounds() -> TaylorRuntime:
    return TaylorRuntime(top_n=2, split=2, every=2)


# -- starting --------------------------------------------------------------------------------------------------------------


def test_help_needs_nothing_but_the_package():
    """The parser brings in none of what commands need, torch least of all; so the command starts at once."""
    script = """
import sys
before = set(sys.modules)
from tnadapt.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "plan" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == "['tnadapt', 'tnadapt.cli']"


def test_a_reader_that_has_seen_enough(tmp_path):
    """`tnadapt inspect … | head -1` ends without a traceback."""
    torch.save(Trained().over.state_dict(), tmp_path / "tnadapt.pt")
    command = [sys.executable, "-m", "tnadapt.cli", "inspect", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# -- plan ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("llama")
    made = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "factorization"),
    [
        (["--order", "5"], MPO(order=5)),
        (["--expansion", "3"], MPO(expansion=3.0)),
        (["--order", "5", "--max-bond", "3", "--gauge", "balanced"], MPO(order=5, max_bond=3, gauge="balanced")),
        (["--factorization", "SVD"], SVD()),
        (["--factorization", "Tucker", "--max-rank", "3"], Tucker(max_rank=3)),
        (["--factorization", "CP", "--components", "5"], CP(rank=5)),
        (["--factorization", "TensorRing", "--order", "4"], TensorRing(order=4)),
        (
            ["--factorization", json.dumps(MPO(order=3, gauge="random", seed=2).to_dict())],
            MPO(order=3, gauge="random", seed=2),
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else value.label,
)
def test_plan_is_that_of_the_library(capsys, config, options, factorization):
    import peft
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(config))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    expected = plan(model, factorization, top_n=2)
    common = ["plan", config, "--targets", "q_proj,v_proj", "--rank", 4, "--top-n", 2, *options]
    assert said(capsys, *common).startswith(str(expected))
    found = json.loads(said(capsys, *common, "--json"))
    assert found["factorization"] == factorization.to_dict()
    assert (found["lora_parameters"], found["trained_parameters"]) == (
        expected.lora_parameters,
        expected.trained_parameters,
    )
    assert [row["growth"] for row in found["rows"]] == [row.structure.expansion for row in expected.rows]
    cores = sum(row["expanded"] * row["parameters"] for row in found["rows"])
    assert found["costs"]["memory_bytes"]["cores"] == 4 * cores


def test_costs_on_several_ranks(capsys, config):
    options = ["--order", 5, "--ranks", 4, "--engine", "fsdp2", "--shard", "--tokens-per-step", 64]
    command = ["plan", config, *options, "--decompose-gflops", 2]
    found = json.loads(said(capsys, *command, "--json"))["costs"]
    assert (found["ranks"], found["engine"], found["shard"], found["tokens_per_step"]) == (4, "fsdp2", True, 64)
    assert found["expansion"]["rate"] == 2e9
    assert "4 ranks, FSDP2, each matrix's cores on one rank:" in said(capsys, *command)


def test_plan_of_explicit_sites(capsys, config):
    shown = said(capsys, "plan", config, "--targets", "q_proj", "--rank", 8, "--sites", "8x2,4x4", status=2)
    assert "multiply to" in shown  # A is 8x32, B is 32x8: one list of sites cannot fit both
    assert "64x2,1x1,64x4" in said(capsys, "plan", config, "--sites", "8,4", status=2)


def test_every_linear_layer_is_the_default(capsys, config):
    found = json.loads(said(capsys, "plan", config / "config.json", "--factorization", "SVD", "--json"))
    assert len(found["rows"]) == 14
    assert all(row["matrices"] == row["expanded"] == 3 for row in found["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "has no order: state one"),
        (["--order", "1"], "order=1"),
        (["--factorization", "Foo"], "'Foo' is unknown; the known ones are"),
        (["--factorization", "SVD", "--order", "3"], "SVD has no setting order"),
        (["--factorization", "{"], "is not JSON"),
        (["--factorization", '{"type": "MPO", "order": 3}', "--order", "4"], "order is given twice"),
        (["--order", "4", "--rank", "0"], "--rank 0 must be at least 1"),
        (["--order", "4", "--top-n", "0"], "top_n=0 must be at least 1"),
        (["--order", "4", "--ranks", "0"], "ranks=0: give a whole number"),
        (["--order", "4", "--tokens-per-step", "-1"], "tokens_per_step=-1: give a whole number"),
        (["--order", "4", "--targets", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(capsys, config, options, message):
    shown = said(capsys, "plan", config, *options, status=2)
    last = shown.strip().splitlines()[-1]
    assert "tnadapt plan: error: " in shown
    assert message in last or message in shown
    assert "Traceback" not in shown


def test_a_folder_without_a_configuration(capsys, tmp_path):
    assert "has no config.json" in said(capsys, "plan", tmp_path, "--order", 4, status=2)
    assert "is not there" in said(capsys, "plan", tmp_path / "config.json", "--order", 4, status=2)
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}', encoding="utf-8")
    assert "no configuration that transformers can read" in said(capsys, "plan", tmp_path, "--order", 4, status=2)


# -- inspect ---------------------------------------------------------------------------------------------------------------

FACTORIZATIONS = [
    MPO(order=5),
    MPO(order=4, max_bond=2),
    MPO(order=3, gauge="spread"),
    SVD(),
    Tucker(),
    Tucker(max_rank=2),
    CP(order=3),
    TensorRing(order=4),
]


@pytest.mark.parametrize("factorization", FACTORIZATIONS, ids=lambda one: one.label)
def test_a_checkpoint_agrees_with_its_adapter(capsys, tmp_path, factorization):
    run = Trained(factorization)
    found = json.loads(said(capsys, "inspect", run.save(tmp_path), "--json"))
    assert found["step"] == 6
    assert [one["name"] for one in found["expanded"]] == list(run.over.expanded)
    assert found["compared"] == len(run.over.expanded) == 4
    assert found["disagreeing"] == []
    for one in found["expanded"]:
        matrix = run.over.matrices[one["name"]]
        assert one["norm"] == pytest.approx(float(matrix.value.norm()), rel=1e-5)
        assert [tuple(shape) for shape in one["core_shapes"]] == list(factorization.core_shapes(matrix.shape))
        assert (one["residual_norm"] is None) == factorization.structure(matrix.shape).exact
        assert one["optimizer_steps"] >= 1
    assert [event["step"] for event in found["history"]] == [2, 4]
    assert [one["step"] for one in found["rounds"]] == [2, 4]
    assert "All 4 matrices in the adapter are what their cores fold to" in said(capsys, "inspect", tmp_path)


def test_an_adapter_of_another_step_is_seen(capsys, tmp_path):
    run = Trained()
    run.save(tmp_path)
    name = run.over.expanded[1]
    weights = copy.deepcopy(run.model.state_dict())
    weights[f"{run.over.matrices[name].module}.lora_{name[-1]}.weight"][0, 0] += 1e-3
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert json.loads(said(capsys, "inspect", tmp_path, "--json"))["disagreeing"] == [name]
    assert f"1 of 4 matrices in the adapter are NOT what their cores fold to: {name}" in said(
        capsys, "inspect", tmp_path
    )


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_adapters_of_peft_are_found(capsys, tmp_path, adapter):
    import peft
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(over.state_dict(), tmp_path / "tnadapt.pt")
    found = json.loads(said(capsys, "inspect", tmp_path, "--json"))
    assert found["compared"] == len(over.matrices) == 4
    assert found["disagreeing"] == []


def test_a_state_alone(capsys, tmp_path):
    """A file of its own, or within a training script's own dictionary; no weights beside it."""
    run = Trained()
    for number, content in enumerate((run.over.state_dict(), {"optimizer": run.optimizer.state_dict(), "epoch": 3})):
        file = tmp_path / f"{number}.pt"
        torch.save(content, file)
        shown = said(capsys, "inspect", file)
        assert "step 6: 4 of 6 matrices are expanded" in shown
        assert "were not compared" in shown
        assert "TaylorRuntime(" in shown
        assert "core_lr        the rate of the matrices" in shown


def test_before_the_first_step(capsys, tmp_path):
    run = Trained(scheduler=Static(), steps=0)
    torch.save(run.over.state_dict(), tmp_path / "tnadapt.pt")
    shown = said(capsys, "inspect", tmp_path)
    assert "6 matrices are expanded at the next step" in shown
    assert "No matrix is expanded" in shown


def test_the_rate_of_the_cores_is_shown(capsys, tmp_path):
    run = Trained(scheduler=Static(), steps=1, core_lr=2e-3)
    torch.save(run.over.state_dict(), tmp_path / "tnadapt.pt")
    assert "core_lr        0.002 at a base rate of 0.01" in said(capsys, "inspect", tmp_path)


def test_what_is_no_checkpoint(capsys, tmp_path):
    assert "is not there" in said(capsys, "inspect", tmp_path / "no", status=2)
    assert "has none of tnadapt.pt, optimizer.pt" in said(capsys, "inspect", tmp_path, status=2)
    (tmp_path / "checkpoint-5").mkdir()
    assert "it holds checkpoint-5, name one of them" in said(capsys, "inspect", tmp_path, status=2)
    (tmp_path / "broken.pt").write_bytes(b"PK not a zip")
    assert "is not a file of torch.save" in said(capsys, "inspect", tmp_path / "broken.pt", status=2)
    torch.save(torch.optim.AdamW(Net().parameters()).state_dict(), tmp_path / "plain.pt")
    assert "has no state of a LoraOver" in said(capsys, "inspect", tmp_path / "plain.pt", status=2)
    torch.save({**Trained(steps=0).over.state_dict(), "version": 999}, tmp_path / "new.pt")
    assert "has format version 999" in said(capsys, "inspect", tmp_path / "new.pt", status=2)
    state = Trained(steps=0).over.state_dict()
    for part in ("scheduler", "rates", "history"):
        torch.save({name: value for name, value in state.items() if name != part}, tmp_path / "damaged.pt")
        words = said(capsys, "inspect", tmp_path / "damaged.pt", status=2)
        assert f"damaged.pt is damaged (KeyError: '{part}')" in words


# -- report ----------------------------------------------------------------------------------------------------------------


def result(
    folder: Path, label: str, curve: list[tuple[int, float]] = (), matrices: list[dict] = (), **config: Any
) -> Path:
    """A folder as the recipes leave it."""
    folder.mkdir(parents=True)
    content = {
        "name": folder.name,
        "label": label,
        "config": {"method": label.lower(), "lr": 1e-2, "core_lr": None, "seed": 0, "order": 4, **config},
        "environment": {"command": "recipe.py --name <x>"},
        "status": "finished",
        "metrics": {
            "loss": 0.5, "steps": 20, "accuracy": 0.625, "base_accuracy": 0.125, "lora_parameters": 1200,
            "trained_parameters": 3400, "training_seconds": 7.3,
        },
        "curve": [list(point) for point in curve],
        "matrices": list(matrices),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def expanded(*steps: int | None) -> list[dict]:
    return [
        {"name": f"layers.{k}.proj.B", "kind": "B", "layer": k, "module": f"layers.{k}.proj", "expanded_at": step}
        for k, step in enumerate(steps)
    ]


def test_runs_in_the_terminal(capsys, tmp_path):
    result(tmp_path / "one", "LoRA", [(1, 3.0), (2, 1.0)])
    result(tmp_path / "two", "LoRA-Over-MPO_R", [(1, 3.0), (2, 2.0)], expanded(5, None, 10, 5), order=9, core_lr=2e-3)
    shown = said(capsys, "report", tmp_path)
    [row] = [line for line in shown.splitlines() if line.startswith("LoRA-Over-MPO_R  ") and "finished" in line]
    assert row.split()[1:] == [
        "finished",
        "62.5",
        "%",
        "12.5",
        "%",
        "0.5",
        "0.01",
        "0.002",
        "0",
        "1,200",
        "3,400",
        "7",
        "s",
    ]
    assert re.search(r"^order +4 +9$", shown, re.MULTILINE)
    assert "LoRA             █▁" in shown
    assert "LoRA-Over-MPO_R  █▅" in shown
    assert "LoRA-Over-MPO_R: 3 of 4 matrices expanded (2 at step 5, 1 at step 10)" in shown
    assert said(capsys, "report", tmp_path / "one", tmp_path / "two", tmp_path) == shown
    assert [one["label"] for one in json.loads(said(capsys, "report", tmp_path, "--json"))] == [
        "LoRA",
        "LoRA-Over-MPO_R",
    ]


def test_runs_of_one_method_are_told_apart(tmp_path):
    for k, seed in enumerate((3, 4)):
        result(tmp_path / f"a{k}", "LoRA", seed=seed)
    result(tmp_path / "b", "SVD", seed=3)
    assert names(read_runs([tmp_path])) == ["LoRA (seed 3)", "LoRA (seed 4)", "SVD"]
    result(tmp_path / "c", "SVD", seed=3)
    assert names(read_runs([tmp_path]))[2:] == ["SVD [b]", "SVD [c]"]


def test_the_page_needs_no_other_file(capsys, tmp_path):
    result(tmp_path / "runs" / "one", "<b>LoRA</b>", [(1, 3.0), (2, 1.0)])
    result(tmp_path / "runs" / "two", "MPO", [(1, 3.0), (2, 2.0)], expanded(5, None, 10))
    page = tmp_path / "page.html"
    assert f"The page with the pictures is {page}." in said(capsys, "report", tmp_path / "runs", "--html", page)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "<b>LoRA</b>" not in text
    assert "&lt;b&gt;LoRA&lt;/b&gt;" in text
    assert "recipe.py --name &lt;x&gt;" in text


def test_a_run_that_failed_is_shown(capsys, tmp_path):
    folder = result(tmp_path / "one", "LoRA")
    content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    failed = {key: content[key] for key in ("name", "label", "config")} | {"status": "failed", "error": "loss is NaN"}
    (folder / "result.json").write_text(json.dumps(failed), encoding="utf-8")
    assert re.search(r"^LoRA +failed +– +– +–", said(capsys, "report", folder), re.MULTILINE)


def test_what_is_no_run(capsys, tmp_path):
    assert "is not a folder" in said(capsys, "report", tmp_path / "no", status=2)
    assert "has no result.json, nor have the folders in it" in said(capsys, "report", tmp_path, status=2)
    for content in ("{", "[]", '{"label": "LoRA"}'):
        (tmp_path / "result.json").write_text(content, encoding="utf-8")
        assert "is not the result of a recipe" in said(capsys, "report", tmp_path, status=2)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=200))
def test_bars_keep_the_order_of_values(values):
    """Never wider than 40; the larger of two values has no lower bar."""
    drawn = bars(values, min(values), max(values))
    assert len(drawn) == min(40, len(values))
    if len(values) <= 40:
        pairs = sorted(zip(values, drawn, strict=True))
        assert [bar for _, bar in pairs] == sorted(drawn)


# -- pictures --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


def test_expansion_map_shows_the_history(trained):
    figure = pictures.expansion_map(trained.over)
    assert figure.get_suptitle() == "4 of 6 matrices were expanded, from step 2 to 4"
    when = {name: event.step for event in trained.over.history for name in event.names}
    for axis in figure.axes[:2]:
        side = axis.get_title()[0]
        [image] = axis.get_images()
        for layer, [value] in enumerate(image.get_array().filled(float("nan")).tolist()):
            step = when.get(f"layers.{layer}.{side}")
            assert (step is None and value != value) or value == step


def test_notebooks_show_pictures_without_pyplot(trained):
    assert pictures.expansion_map(trained.over)._repr_png_().startswith(b"\x89PNG")


def test_no_title_is_wider_than_its_picture(trained):
    """Narrow pictures, of one group or one layer, break their titles."""
    spectra = {"proj": torch.ones(4)}
    drawn = [
        pictures.expansion_map(trained.over),
        pictures.expansion_map({"proj.A": 3}),
        pictures.score_trajectories(trained.over),
        pictures.singular_values(spectra, spectra),
        pictures.update_norms(trained.norms),
        pictures.loss_curves({"run": trained.curve}, trained.over.history),
    ]
    for figure in drawn:
        figure.canvas.draw()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0, figure.get_suptitle()
        assert box.x1 <= figure.bbox.width, figure.get_suptitle()


def test_columns_of_modules_that_end_alike_are_told_apart():
    figure = pictures.expansion_map({"encoder.0.attn.q.A": 1, "decoder.0.attn.q.A": None})
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["encoder.*.attn.q", "decoder.*.attn.q"]


def test_score_trajectories_end_where_matrices_are_chosen(trained):
    figure = pictures.score_trajectories(trained.over)
    assert {axis.get_title() for axis in figure.axes} == {"layers.*.A", "layers.*.B"}
    dots = {
        tuple(map(float, (*line.get_xdata(), *line.get_ydata())))
        for axis in figure.axes
        for line in axis.get_lines()
        if line.get_marker() == "o"
    }
    chosen = {
        (float(one["step"]), one["scores"][name]) for one in trained.over.scheduler.rounds for name in one["selected"]
    }
    assert dots == chosen
    with pytest.raises(ValueError, match="has had no round yet"):
        pictures.score_trajectories(rounds())
    with pytest.raises(TypeError, match="got Static"):
        pictures.score_trajectories(Trained(scheduler=Static(), steps=0).over)


def test_spectra_are_those_of_the_product(trained):
    after = pictures.spectra(trained.model)
    for k, layer in enumerate(trained.model.layers):
        product = (layer.lora_B.weight @ layer.lora_A.weight).detach().double()
        torch.testing.assert_close(after[f"layers.{k}"], torch.linalg.svdvals(product)[:4], atol=1e-7, rtol=1e-5)
    figure = pictures.singular_values(trained.before, after)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["before: all zero", "after"]
    with pytest.raises(ValueError, match=r"layers\.2 is in one of the two only"):
        pictures.singular_values(trained.before, {name: after[name] for name in list(after)[:2]})
    with pytest.raises(ValueError, match="no LoRA pairs"):
        pictures.spectra(nn.Linear(2, 2))


@given(st.integers(1, 12))
def test_effective_rank_of_equal_values_is_their_number(count):
    assert pictures.effective_rank(torch.full((count,), 0.3, dtype=torch.float64)) == pytest.approx(count)
    assert pictures.effective_rank(torch.zeros(count)) == 0


def test_update_norms_have_a_row_for_each_matrix(trained):
    figure = pictures.update_norms(trained.norms)
    [mesh] = [c for c in figure.axes[0].collections if c.get_array() is not None]
    values = mesh.get_array()
    assert values.shape == (4, 6)
    rows = sorted(trained.over.expanded, key=lambda name: (name[-1], name))
    for row, name in zip(values.filled(0.0).tolist(), rows, strict=True):
        assert row == pytest.approx([trained.norms[step].get(name, 0.0) for step in range(1, 7)])
    with pytest.raises(ValueError, match="no matrix has moved"):
        pictures.update_norms({1: {}})


def test_loss_curves_mark_expansions(trained):
    figure = pictures.loss_curves({"run": trained.curve}, trained.over.history)
    curve, *marks = figure.axes[0].get_lines()
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == trained.curve
    assert [line.get_xdata()[0] for line in marks] == [2, 4]
    assert "matrices expanded (+)" in figure.get_suptitle().replace("\n", " ")
    with pytest.raises(ValueError, match="no points to draw"):
        pictures.loss_curves({"run": []})
