"""Every code block of the README, the docs and the docstrings runs, links lead somewhere, and the site builds without a warning."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

import tnadapt
from tests.browser import chromium, faults
from tests.pages import DOCS, ROOT, as_script, blocks, run, run_docstrings
from tnadapt.cli import _parser
from tnadapt.engine.checks import REFUSED

PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])

#: files whose tests run the blocks of pages, with more checks than that they run; all other pages run here
ELSEWHERE = {
    "tests/guides/test_guides.py": "plain_loop own_model trainer trl lightning qlora accelerate",
    "tests/factorizations/test_plugins.py": "plugins",
    "tests/test_docs.py": "distributed quickstart ablation",
}
TOLD = {page: file for file, pages in ELSEWHERE.items() for page in pages.split()}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples write into the folder that they are run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "figures"))


HERE = [page for page in PAGES if blocks(page) and page.stem not in TOLD]


@pytest.mark.parametrize("page", [page for page in HERE if page.parent.name != "notebooks"], ids=name)
def test_examples_run(page: Path) -> None:
    run(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in HERE if page.parent.name == "notebooks"], ids=name)
def test_notebooks_run(page: Path) -> None:
    run(page)


def test_pages_with_tests_of_their_own() -> None:
    assert TOLD.keys() <= {page.stem for page in PAGES if blocks(page)}
    for page, file in TOLD.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"{page}.md" in text, f"{file} does not run {page}.md"


def test_the_ablation_is_a_loop_of_five_lines() -> None:
    """Five variants of a model with four factorizations, each trained through what its adapters bring."""
    page = DOCS / "guides" / "ablation.md"
    loops = [node for code in blocks(page) for node in ast.parse(code).body if isinstance(node, ast.For)]
    (loop,) = [node for node in loops if "LoraOver" in ast.unparse(node)]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 == 5
    namespace = run(page)
    losses, numbers = zip(*namespace["results"].values(), strict=True)
    assert len(set(losses)) == len(losses) == 5
    assert max(losses) < torch.nn.functional.mse_loss(namespace["build"]({})(namespace["x"]), namespace["target"])
    # the mixed model has more numbers than that with the SVD in the layer of A's MPO
    assert numbers[0] > numbers[2]


def test_the_adapter_of_the_quickstart_is_plain(tmp_path: Path) -> None:
    """PEFT alone loads what the quickstart saves, and finds the function that was trained."""
    import peft

    namespace = run(DOCS / "quickstart.md")
    torch.manual_seed(0)
    base = type(namespace["base"])(namespace["config"])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    data = namespace["data"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=data).logits, namespace["model"].eval()(input_ids=data).logits)
    assert namespace["curve"][-1][1] < 0.8 * namespace["curve"][0][1]


@pytest.mark.slow
def test_several_ranks_as_the_page_says(tmp_path: Path) -> None:
    """All blocks of docs/distributed.md are one script, which torchrun starts on CPU ranks."""
    script = tmp_path / "train.py"
    script.write_text(as_script(DOCS / "distributed.md"), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the checkpoint was read") == 2


def docstrings(path: Path) -> list[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]


def test_examples_in_docstrings_run() -> None:
    """Examples in docstrings are doctests, which run here; code in another form would not, so there is none."""
    modules = sorted((ROOT / "tnadapt").rglob("*.py"))
    for path in modules:
        for text in docstrings(path):
            assert not re.search(r"^\s*```|::\s*$", text, re.MULTILINE), f"{path}: code that is not run"
    assert sum(run_docstrings(path) for path in modules if ">>>" in path.read_text(encoding="utf-8")) > 5


# -- commands --------------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of each command line that is no Python: those in fenced blocks, comments taken away."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if language in ("", "bash") and re.match(r"(tnadapt|python|make) ", line):
                    found.append((name(page), shlex.split(line, comments=True)))
    return found


def test_commands_exist() -> None:
    """The options of `tnadapt` are its parser's, scripts are there, and so are targets of make."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = commands()
    assert {words[0] for _, words in found} == {"tnadapt", "python", "make"}
    for page, words in found:
        if words[0] == "tnadapt":
            _parser().parse_args(words[1:])  # exits where it does not know an option
        elif words[0] == "make":
            assert words[1] in targets, f"{page}: make {words[1]}"
        elif words[1] != "-m":
            assert (ROOT / words[1]).is_file(), f"{page}: {words[1]}"


# -- what pages say of the code --------------------------------------------------------------------------------------------


def template(node: ast.AST) -> str:
    """A text of the source with … for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """Each entry is a piece of a text in the source; `…` at an end stands for the rest."""
    sources = "\n".join(
        template(node)
        for path in (ROOT / "tnadapt").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)
    )
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    entries = re.findall(r"^`(.+)`\n: ", page, re.MULTILINE)
    assert len(entries) > 40
    for entry in entries:
        assert entry.strip("… ") in sources, f"no message reads: {entry}"


def test_every_refused_optimizer_is_in_the_table() -> None:
    page = (DOCS / "limits.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in REFUSED)


def test_the_laws_of_depth_hold() -> None:
    """What the page on mathematics derives of a middle core is what it does, within a fifth; and the factors that it names."""
    depth = importlib.import_module("depth")
    for steady in (True, False):
        far = depth.walk(8, steady).distances
        for step in (1, 5, 10, 20, 30):
            assert far[step - 1] == pytest.approx(depth.predicted(step, steady), rel=0.2)
    plain = depth.walk(1, False, steps=1).updates[0]
    first = [depth.walk(order, False, steps=1).updates[0] / plain for order in (4, 8, 16)]
    assert [round(ratio, 1) for ratio in first] == [1.4, 2.3, 4.2]
    assert 14 * depth.predicted(1, True) == pytest.approx(0.095, abs=5e-4)


# -- links and the site ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_files_that_pages_name_are_there() -> None:
    for page in PAGES:
        if page.stem in ("mutation", "CHANGELOG"):  # of the code as it was
            continue
        for file in re.findall(
            r"`((?:tests|tnadapt|benchmarks|recipes|docs)/[\w/.-]+)`", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / file).exists(), f"{page.name} names {file}, which is not there"


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^([a-z_]+(?:/[a-z_]+)?)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} == {"index", *listed}


def test_every_factorization_has_a_page() -> None:
    public = (getattr(tnadapt, name) for name in tnadapt.__all__)
    classes = {cls for cls in public if isinstance(cls, type) and issubclass(cls, tnadapt.Factorization)}
    pages = {page.stem.replace("_", "") for page in (DOCS / "factorizations").glob("*.md")}
    assert pages == {cls.__name__.lower() for cls in classes - {tnadapt.Factorization}} | {"backends"}


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert set(tnadapt.__all__) <= set(re.findall(r":: tnadapt\.(\w+)$", page, re.MULTILINE))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, in which a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert built.returncode == 0, built.stderr
    return folder


def read_html(page: Path) -> tuple[set[str], set[str]]:
    """The places that links of a page lead to, and the names that links to it may have after `#`."""
    parser = HTMLParser()
    links, names = set[str](), set[str]()

    def start(tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        links.update(value for key in ("href", "src") if (value := given.get(key)))
        names.update(value for key in ("id", "name") if (value := given.get(key)))

    parser.handle_starttag = start  # type: ignore[method-assign]
    parser.feed(page.read_text(encoding="utf-8"))
    return links, names


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    pages = {page: read_html(page) for page in site.rglob("*.html")}
    assert len(pages) > 30
    for page, (links, _) in pages.items():
        for link in links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            assert target.is_file(), f"{page.name}: {link}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in pages[target][1], f"{page.name}: {link}"


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_the_site_in_a_browser_on_a_phone(site: Path) -> None:
    """Nothing is missing, no formula is broken, nothing is asked of the network, and no page scrolls sideways."""
    pages = [page for page in sorted(site.rglob("*.html")) if "_modules" not in page.parts]
    assert faults(pages) == {}


@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
def test_what_a_browser_shows_is_looked_at(tmp_path: Path) -> None:
    """The look finds a page that is too wide, a picture that is not there, and one that needs the network."""
    head = '<!doctype html><meta name="viewport" content="width=device-width">'
    bad, good = tmp_path / "bad.html", tmp_path / "good.html"
    bad.write_text(
        head + '<div style="width: 800px">wide</div><img src="none.png"><img src="http://127.0.0.1:9/x.png">'
    )
    good.write_text(head + '<div style="overflow-x: auto"><div style="width: 800px">wide</div></div>')
    found = faults([bad, good])
    assert found.keys() == {"bad.html"}
    text = "; ".join(found["bad.html"])
    assert all(piece in text for piece in ("sideways", "DIV", "a picture is not there", "asks the network"))
