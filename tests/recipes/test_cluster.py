"""A sweep on a Ray cluster: same files as on one machine, runs that outlive their node, and what is refused."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support import cluster

from recipes import ablate

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = ["--train-size", "8", "--eval-size", "2", "--batch", "2", "--micro-batch", "2", "--max-new-tokens", "2"]

#: The recipe, which notes each start of a run, and waits in it until a file is there.
WATCHED = """
import dataclasses, os, time
from pathlib import Path

from llama31_gsm8k import RECIPE as real

FOLDER = Path({folder!r})


def load(config):
    with (FOLDER / "started").open("a") as file:
        file.write(f"{{config.lr}} {{os.getpid()}}\\n")
    while not (FOLDER / "go").exists():
        time.sleep(0.1)
    return real.load(config)


RECIPE = dataclasses.replace(real, load=load)
"""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return pytest.importorskip("ray")


def command(
    folder: Path, model: str, *options: str, lrs: tuple[str, ...] = ("1e-3", "2e-3", "3e-3", "4e-3")
) -> list[str]:
    common = ["tune", "--methods", "lora", "--runs", str(folder / "runs"), "--model", model, "--max-steps", "2", *TINY]
    return [*common, "--eval-split", "validation", "--lrs", *lrs, *options]


def results(folder: Path) -> dict[float, dict[str, Any]]:
    """By learning rate; each has one folder."""
    files = list((folder / "runs").glob("*/result.json"))
    found = [json.loads(file.read_text()) for file in files]
    assert len({result["config"]["lr"] for result in found}) == len(found)
    return {result["config"]["lr"]: result for result in found}


@pytest.mark.slow
def test_a_node_that_dies_costs_no_run_and_repeats_none_that_is_finished(
    ray: Any, tmp_path: Path, tiny_model: str
) -> None:
    """Two nodes of one CPU each and four runs; a node dies while both are in the middle of one."""
    from ray.cluster_utils import Cluster

    recipe = tmp_path / "watched.py"
    recipe.write_text(WATCHED.format(folder=str(tmp_path)))
    started = tmp_path / "started"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    arguments = command(tmp_path, tiny_model, "--recipe", str(recipe), "--cluster", nodes.address)
    failed: list[BaseException] = []

    def sweep() -> None:
        try:
            ablate.main(arguments)
        except BaseException as error:
            failed.append(error)

    try:
        thread = threading.Thread(target=sweep)
        thread.start()
        deadline = time.monotonic() + 120
        while not started.exists() or len(started.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline, "two runs did not start"
            assert not failed, failed
            time.sleep(0.2)
        nodes.remove_node(second, allow_graceful=False)
        (tmp_path / "go").touch()
        thread.join(300)
        assert not thread.is_alive()
        assert not failed, failed
        found = results(tmp_path)
        assert sorted(found) == [1e-3, 2e-3, 3e-3, 4e-3]
        assert all(result["status"] == "finished" for result in found.values())
        starts = [float(line.split()[0]) for line in started.read_text().splitlines()]
        assert len(starts) == 5, "the run of the lost node is begun twice, no other"
        assert not [path for path in (tmp_path / "runs" / "unfinished").iterdir() if path.is_dir()]
        # the same command again: nothing is run, and the table is the same
        before = {lr: result["ended"] for lr, result in found.items()}
        ablate.main(arguments)
        assert {lr: result["ended"] for lr, result in results(tmp_path).items()} == before
        assert len(started.read_text().splitlines()) == 5
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.slow
def test_a_new_local_cluster_leaves_what_one_machine_leaves(ray: Any, tmp_path: Path, tiny_model: str) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    ablate.main(command(there, tiny_model, "--cluster", lrs=("1e-3",)))
    ablate.main(command(here, tiny_model, lrs=("1e-3",)))
    assert not ray.is_initialized()
    one, other = (
        {path.relative_to(folder / "runs") for path in (folder / "runs").rglob("*") if path.suffix != ".lock"}
        for folder in (there, here)
    )
    assert one == other
    assert results(there)[1e-3]["curve"] == results(here)[1e-3]["curve"]
    assert results(there)[1e-3]["metrics"]["loss"] == results(here)[1e-3]["metrics"]["loss"]


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        ablate.main(command(folder, "embedded", *options))
    assert ended.value.code == 2
    assert not list(folder.iterdir())
    return capsys.readouterr().err


def test_without_ray(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--cluster needs Ray, which is not installed: pip install 'tnadapt[cluster]'" in refused(
        capsys, tmp_path, "--cluster"
    )


def test_an_address_where_nothing_answers(ray: Any, capsys: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said = refused(capsys, tmp_path, "--cluster", address)
    assert f"--cluster is '{address}': no Ray cluster answers there" in said
    assert "ray start --head" in said
    assert "give host:port" in refused(capsys, tmp_path, "--cluster", "somewhere")


def test_shares_of_gpus_that_mean_nothing(capsys: Any, tmp_path: Path) -> None:
    for wanted in ("-1", "1.5"):
        assert f"--gpus-per-run is {wanted}: give" in refused(capsys, tmp_path, "--cluster", "--gpus-per-run", wanted)
    assert "add --cluster" in refused(capsys, tmp_path, "--gpus-per-run", "1")


def test_more_gpus_than_a_node_has(capsys: Any, tmp_path: Path) -> None:
    """What the cluster says of its nodes is all that is asked of it."""

    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            gone = {"Alive": False, "Resources": {"GPU": 8.0}}
            return [gone, {"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"GPU": 2.0}}]

    cluster.require_gpus(Ray, "there:1", 2.0)
    cluster.require_gpus(Ray, "there:1", 0.5)
    with pytest.raises(ValueError, match=r"--gpus-per-run is 3: no node of the cluster 'there:1' .*\(they have 2, 0\)"):
        cluster.require_gpus(Ray, "there:1", 3.0)


@pytest.mark.slow
def test_a_cluster_without_the_wanted_gpus(ray: Any, capsys: Any, tmp_path: Path) -> None:
    said = refused(capsys, tmp_path, "--cluster", "--gpus-per-run", "1")
    assert "--gpus-per-run is 1: no node of the cluster 'local' has as many GPUs (they have 0)" in said


def test_a_node_without_the_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.getcwd())
    missing = str(tmp_path / "nowhere")
    recipe, lock = RECIPES / "llama31_gsm8k.py", tmp_path / "lock"
    result = cluster._in_worker((str(RECIPES), missing), str(recipe), {"lr": 1e-3}, str(tmp_path), str(lock))
    assert f"{missing} is not on {socket.gethostname()}" in result["error"]
    assert "same paths on every node" in result["error"]
