"""Ranks that torchrun starts share a run: the bytes are those of one process, whatever is lost."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import loraq
from tests import gate
from tests.clusters import Cluster, finished, make_source, solved
from tests.folders import files_of
from tests.gate import add_passes, ranks_at

pytestmark = pytest.mark.slow

RECIPE = {**loraq.Recipe.named("mxfp4+w8a8-r8").to_dict(), "method": "lqer"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("torchrun")
    make_source(place / "source.safetensors", n_layers=6, width=64)
    recipe = loraq.Recipe.from_dict(RECIPE)
    loraq.quantize_checkpoint(
        place / "source.safetensors", place / "expected", recipe, progress=False
    )
    (place / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    return place


def quantize(place: Path, target: Path, *options: str) -> list[str]:
    recipe = ("--recipe", str(place / "recipe.json"))
    source = str(place / "source.safetensors")
    return ["-m", "loraq", "quantize", source, str(target), *recipe, *options]


@pytest.mark.parametrize(("hosts", "ranks"), [(1, 1), (1, 2), (1, 3), (2, 1)])
def test_ranks_and_hosts_do_not_change_a_byte(place, tmp_path, hosts, ranks):
    with Cluster(quantize(place, tmp_path / "out"), hosts, ranks) as cluster:
        outputs = cluster.read_all(120)
    assert [agent.returncode for agent in cluster.agents] == [0] * hosts, outputs
    assert files_of(tmp_path / "out") == files_of(place / "expected")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # One rank speaks.
    assert sum(output.count("Written to") for output in outputs) == 1
    assert sorted(solved(outputs[0])) == [f"blocks.{i}.proj" for i in range(6)]
    assert not any(solved(output) for output in outputs[1:])


def test_an_error_is_told_once(place, tmp_path):
    with Cluster(quantize(place, tmp_path / "out", "--config", "nowhere.json"), 1, 3) as cluster:
        (output,) = cluster.read_all(120)
    assert cluster.agents[0].returncode != 0
    assert output.count("Error: 'nowhere.json' is missing.") == 1
    assert not list(tmp_path.iterdir())


def test_every_rank_gets_the_report(place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, loraq
report = loraq.quantize_checkpoint(
    {str(place / "source.safetensors")!r}, {str(tmp_path / "out")!r},
    {str(place / "recipe.json")!r}, progress=False,
)
again = loraq.quantize_checkpoint(
    {str(place / "source.safetensors")!r}, {str(tmp_path / "out")!r},
    {str(place / "recipe.json")!r}, progress=False,
)
print("rank", os.environ["RANK"], report.mean_relative_error, again.already_complete)
""")
    with Cluster([str(script)], 1, 2) as cluster:
        (output,) = cluster.read_all(120)
    lines = sorted(line for line in output.splitlines() if line.startswith("rank"))
    assert [line.split()[1] for line in lines] == ["0", "1"], output
    assert len({line.split()[2] for line in lines}) == 1
    assert {line.split()[3] for line in lines} == {"True"}


def test_a_budget_is_shared_by_ranks_too(place, tmp_path):
    recipe = loraq.Recipe.named("mxfp4+w8a8").to_dict()
    recipe |= {"method": "lqer", "allocation": "greedy"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    source = place / "source.safetensors"
    loraq.quantize_checkpoint(source, tmp_path / "alone", tmp_path / "recipe.json", progress=False)
    command = ["-m", "loraq", "quantize", source, tmp_path / "out"]
    command += ["--recipe", tmp_path / "recipe.json"]
    with Cluster([str(part) for part in command], 1, 2) as cluster:
        (output,) = cluster.read_all(120)
    assert cluster.agents[0].returncode == 0, output
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone")


def test_a_rank_on_another_kind_of_machine_is_refused(place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys
import loraq.pipeline.target as target
if os.environ["RANK"] == "1":
    target.describe_machine = lambda *_: {{"processor": "another"}}
from loraq.cli import main
sys.argv = ["loraq"] + {quantize(place, tmp_path / "out")[2:]!r}
main()
""")
    with Cluster([str(script)], 1, 2) as cluster:
        (output,) = cluster.read_all(120)
    assert cluster.agents[0].returncode != 0
    assert output.count("Error: Rank 1 would not make the bytes that rank 0 makes.") == 1
    assert "'another' now" in output


def test_the_layers_of_a_lost_rank_are_taken_by_others(tmp_path):
    names = make_source(tmp_path / "source.safetensors", n_layers=12, width=224)
    target = tmp_path / "out"
    add_passes(tmp_path / "passes", 6)
    with Cluster(gated(tmp_path), 1, 3, torchrun=False) as cluster:
        wait_for_a_layer(cluster, target)
        cluster.agents[2].kill()
        add_passes(tmp_path / "passes", 12)
        outputs = cluster.read_all(120)
    assert [agent.returncode for agent in cluster.agents] == [0, 0, -signal.SIGKILL], outputs
    assert sorted(solved(outputs[0])) == sorted(names)
    assert files_of(target) == expected_of(tmp_path)


def gated(folder: Path) -> list[str]:
    """Return the command that waits for a pass before each layer of the source in a folder."""
    source, target = f"{folder}/source.safetensors", f"{folder}/out"
    return [gate.__file__, f"{folder}/passes", "quantize", source, target, "--effort", "fast"]


def wait_for_a_layer(cluster: Cluster, target: Path) -> None:
    while not finished(target):
        time.sleep(0.02)
        assert cluster.agents[0].poll() is None, cluster.read_all(1)


def expected_of(folder: Path) -> dict[str, bytes]:
    """Return what one process makes of the source in a folder."""
    recipe = loraq.Recipe.from_dict({**loraq.Recipe.named("default").to_dict(), "effort": "fast"})
    loraq.quantize_checkpoint(
        folder / "source.safetensors", folder / "expected", recipe, progress=False
    )
    return files_of(folder / "expected")


@pytest.mark.parametrize("victim", ["rank", "agent", "all"])
def test_kill_9_and_the_same_command_again(place, tmp_path, victim):
    names = make_source(tmp_path / "source.safetensors", n_layers=8, width=224)
    target = tmp_path / "out"
    add_passes(tmp_path / "passes", 3)
    with Cluster(gated(tmp_path), 1, 2) as cluster:
        wait_for_a_layer(cluster, target)
        # Who has not met the others yet waits five minutes for them.
        while ranks_at(tmp_path / "passes") != {"0", "1"}:
            time.sleep(0.02)
        for pid, rank in cluster.processes().items():
            if victim == "all" or (rank == "agent") == (victim == "agent"):
                os.kill(pid, signal.SIGKILL)
        add_passes(tmp_path / "passes", 3)  # for what was not killed, which finds out by itself
        assert cluster.wait_for_end(120)
        done = finished(target)
    assert 0 < len(done) < len(names)
    add_passes(tmp_path / "passes", 8)
    with Cluster(gated(tmp_path), 1, 2) as cluster:
        (output,) = cluster.read_all(120)
    assert cluster.agents[0].returncode == 0, output
    assert sorted(solved(output)) == sorted({*names} - done)
    assert f"{len(done)} of them were finished before" in output
    assert files_of(target) == expected_of(tmp_path)
