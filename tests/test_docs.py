"""Every code block of the README and of the guides runs, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = [DOCS / "guides" / f"{name}.md" for name in ("plain_loop", "trainer", "trl", "ablation")]
NOTEBOOKS = [DOCS / name for name in ("index.md", "quickstart.md", "guides/pictures.md")]


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line and text of each Python block, be it fenced code or a cell of a notebook."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(
        r"^```(?:python|\{code-cell\} python)\n((?::[^\n]*\n)*)(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found]


def run(page: Path, namespace: dict[str, Any]) -> None:
    """Blocks of one page run one after the other in one namespace; errors name the line of the page."""
    found = blocks(page)
    assert found, f"{page.name} has no example"
    for line, code in found:
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write into the folder that they are run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "figures"))


@pytest.mark.parametrize("page", [*GUIDES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_of_the_guides(page: Path, tmp_path: Path) -> None:
    run(page, {"__name__": "__main__"})
    if page.stem in ("quickstart", "trainer"):
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_ablation_is_a_loop_of_five_lines() -> None:
    """Five variants of a model with four factorizations, each trained through what its adapters bring."""
    page = DOCS / "guides" / "ablation.md"
    loops = [node for _, code in blocks(page) for node in ast.parse(code).body if isinstance(node, ast.For)]
    (loop,) = [node for node in loops if "LoraOver" in ast.unparse(node)]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 == 5
    namespace: dict[str, Any] = {}
    run(page, namespace)
    losses, numbers = zip(*namespace["results"].values(), strict=True)
    assert len(set(losses)) == len(losses) == 5
    assert max(losses) < torch.nn.functional.mse_loss(namespace["build"]({})(namespace["x"]), namespace["target"])
    # the mixed model has more numbers than that with the SVD in the layer of A's MPO
    assert numbers[0] > numbers[2]


def test_the_adapter_of_the_quickstart_is_plain(tmp_path: Path) -> None:
    """PEFT alone loads what the quickstart saves, and finds the function that was trained."""
    import peft

    namespace: dict[str, Any] = {}
    run(DOCS / "quickstart.md", namespace)
    torch.manual_seed(0)
    base = type(namespace["base"])(namespace["config"])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    data = namespace["data"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=data).logits, namespace["model"].eval()(input_ids=data).logits)
    assert namespace["curve"][-1][1] < 0.8 * namespace["curve"][0][1]


# -- the README ------------------------------------------------------------------------------------------------------------


def what_a_reader_has() -> dict[str, Any]:
    """The names that the README leaves to its reader: a base model, LoRA's settings, trainer arguments and data."""
    import datasets
    import peft
    import transformers
    import trl
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1} | {f"w{k}": k for k in range(2, 40)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    rows = datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in torch.randint(2, 40, (8, 6))])
    return {
        "torch": torch,
        "base": transformers.LlamaForCausalLM(config),
        "lora_config": peft.LoraConfig(r=8, target_modules="all-linear"),
        "args": trl.SFTConfig("out", max_steps=1, report_to="none", use_cpu=True),
        "SFTTrainer": functools.partial(trl.SFTTrainer, train_dataset=rows, processing_class=tokenizer),
    }


def test_examples_of_the_readme() -> None:
    """Statement by statement; a reader trains before `fold()`, and has a model of the class `Block` once it is defined."""
    namespace = what_a_reader_has()
    page = ROOT / "README.md"
    done: list[str] = []
    for line, code in blocks(page):
        namespace |= {"base": type(namespace["base"])(namespace["base"].config)}
        for statement in ast.parse("\n" * line + code).body:
            text = ast.unparse(statement)
            if text == "over.fold()":
                ids = torch.arange(8)[None]
                namespace["model"](input_ids=ids, labels=ids).loss.backward()
                namespace["optimizer"].step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(ast.Module([statement], []), str(page), "exec"), namespace)
            if text.startswith("class Block"):
                model = namespace["model"] = namespace["Block"]()
                namespace["optimizer"] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            done.append(text)
    assert "over.fold()" in done
    assert any("LoraOverCallback(" in text for text in done)
    assert Path("adapter/adapter_config.json").is_file()


# -- links and the site ----------------------------------------------------------------------------------------------------

PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^([a-z_]+(?:/[a-z_]+)?)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} == {"index", *listed}


def test_every_public_name_is_in_the_reference() -> None:
    import tnadapt

    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert set(tnadapt.__all__) <= set(re.findall(r":: tnadapt\.(\w+)$", page, re.MULTILINE))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "api.html").is_file()
