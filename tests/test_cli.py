"""The command line: every command succeeds, fails with one message, and prints one JSON document
when asked to.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from small.pixart import small_pixart
from torch import nn

import loraq
from loraq.advice import advice_for
from loraq.cli import main
from loraq.cli.options import size_option_value
from loraq.cli.output import print_json, print_table
from loraq.errors import CheckpointError, LoraqError
from loraq.figures import size_of
from loraq.kernels import BACKENDS
from loraq.pipeline.ranks import Ranks
from loraq.pipeline.tickets import Place
from loraq.recipe import Recipe

pytest.importorskip("diffusers")

COMMANDS = [
    "quantize",
    "plan",
    "inspect",
    "compare",
    "absorb-lora",
    "append-lora",
    "remove-lora",
    "formats",
    "methods",
    "demo",
    "doctor",
    "stats",
    "export",
    "report",
    "import",
    "evaluate",
]
FAST = ("--recipe", "mxfp4+w8a8-r8", "--effort", "fast", "--keep", "float")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    """Return stdout of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(*arguments: object) -> dict:
    """Return the one JSON document that is all of stdout."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(succeeds(*arguments, "--json"), parse_constant=no_constant)
    assert isinstance(found, dict)
    return found


def fails(*arguments: object) -> str:
    """Return the message of a command that must fail, on stderr, alone and without a traceback."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error") == 1
    return result.stderr.removeprefix("Error: ").strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small float transformer, a pipeline around
    it, and what `quantize` made of both.
    """
    place = tmp_path_factory.mktemp("place")
    model = small_pixart(torch.float32, num_layers=1)
    model.save_pretrained(place / "float")
    model.save_pretrained(place / "pipeline" / "transformer")
    index = {"transformer": ["diffusers", "PixArt"], "vae": ["diffusers", "AutoencoderKL"]}
    (place / "pipeline" / "model_index.json").write_text(json.dumps(index))
    succeeds("quantize", place / "float", place / "quantized", *FAST)
    succeeds("quantize", place / "pipeline", place / "quantized-pipeline", *FAST)
    return place


# --- help -----------------------------------------------------------------------------------------


def test_help_lists_every_command():
    assert sorted(main.commands) == sorted(COMMANDS)
    for flag in ("--help", "-h"):
        text = succeeds(flag)
        assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_ends_its_text_with_an_example(name):
    text = succeeds(name, "--help")
    assert f"Usage: main {name} [OPTIONS]" in text
    assert f"Example: loraq {name}" in text
    assert "--json" in text
    assert "--debug" in text
    assert succeeds(name, "-h") == text


def test_the_version():
    assert succeeds("--version") == f"loraq, version {loraq.__version__}\n"


HELP_ONLY = """
import sys
from loraq.cli import main
from loraq.cli.output import print_json, print_table
for arguments in (["--help"], *([name, "--help"] for name in main.commands)):
    main(arguments, standalone_mode=False)
heavy = {"torch", "numpy", "safetensors", "diffusers", "transformers", "matplotlib"}
heavy |= {"sklearn", "rich"}
sys.stderr.write(" ".join(sorted(heavy & set(sys.modules))))
"""


def test_help_loads_nothing_heavy():
    finished = subprocess.run(
        [sys.executable, "-c", HELP_ONLY], capture_output=True, text=True, check=True
    )
    assert finished.stderr == ""
    assert finished.stdout.count("Usage:") == 1 + len(COMMANDS)


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "loraq", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stdout.endswith(f"version {loraq.__version__}\n")
    assert finished.stderr == ""


# --- usage errors ---------------------------------------------------------------------------------


def test_effort_without_loraq_is_refused_before_the_source_is_looked_at():
    result = run("quantize", "nowhere", "out", "--method", "gptq", "--effort", "fast")
    assert result.exit_code == 2
    assert "Method 'gptq' has no levels of effort. Leave --effort out, or use" in result.stderr
    assert "(loraq)" in result.stderr


def test_the_effort_of_a_recipe_whose_method_is_overridden_is_a_note(place, tmp_path):
    (tmp_path / "recipe.toml").write_text('scheme = "mxfp4+w8a8-r8"\neffort = "fast"\n')
    source = place / "float"
    note = "Note: method 'rtn' has no levels of effort, so the recipe's 'fast' changes nothing."
    for method, expected in (("rtn", True), ("loraq", False)):
        result = run("plan", source, "--recipe", tmp_path / "recipe.toml", "--method", method)
        assert result.exit_code == 0, result.stderr
        assert (note in result.stderr) is expected
        assert "Note" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("quantize",),
        ("quantize", "a"),
        ("quantize", "a", "b", "c"),
        ("quantize", "a", "b", "--workers", "0"),
        ("quantize", "a", "b", "--workers", "many"),
        ("quantize", "a", "b", "--effort", "best", "--method", "svdquant"),
        ("plan", "a", "--effort", "default", "--method", "rtn"),
        ("quantize", "a", "b", "--seed", "x"),
        ("quantize", "a", "b", "--nonsense"),
        ("plan",),
        ("inspect",),
        ("compare", "a"),
        ("formats", "a"),
        ("demo", "--images", "3"),
        ("stats", "a"),
        ("stats", "a", "b", "--samples", "0"),
        ("stats", "a", "b", "--memory", "much"),
        ("stats", "a", "b", "--dtype", "int4"),
        ("stats", "a", "b", "--set", "height"),
        ("evaluate", "a", "b", "--images", "c"),
        ("evaluate", "a", "b", "--prompts", "p"),
        ("evaluate", "a", "b", "--prompts", "p", "--images", "c", "--count", "0"),
    ],
    ids=" ".join,
)
def test_a_usage_error_is_exit_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert "Error: " in result.stderr


# --- stats ----------------------------------------------------------------------------------------


def test_stats_needs_something_that_draws(place, tmp_path):
    assert "is a model alone, and cannot draw images by itself" in fails(
        "stats", place / "float", tmp_path / "s.safetensors"
    )


def test_stats_reads_the_prompts_first(place, tmp_path):
    (tmp_path / "empty.txt").touch()
    asked = (
        "stats",
        place / "pipeline",
        tmp_path / "s.safetensors",
        "--prompts",
        tmp_path / "empty.txt",
    )
    assert "holds no prompt" in fails(*asked)


# --- quantize -------------------------------------------------------------------------------------


def test_quantize_prints_results_on_stdout_and_progress_on_stderr(place, tmp_path):
    result = run("quantize", place / "float", tmp_path / "out", *FAST)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "8 layers quantized, 8 kept."
    assert lines[1].startswith("Linear weights: ")
    assert lines[-1] == f"Written to {tmp_path / 'out'}."
    progress = result.stderr.splitlines()
    assert len(progress) == 9
    assert re.fullmatch(r"quantize: 8 layers, about \d+ s, 0\.\d GB peak", progress[0])
    assert progress[1].startswith("quantize: layer 1 of 8, error 0.")
    assert len(loraq.load(tmp_path / "out").transformer_blocks) == 1


def test_quantize_writes_files_of_the_size_that_is_asked_for(place, tmp_path):
    succeeds("quantize", place / "float", tmp_path / "out", *FAST, "--shard-size", "20kB")
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1
    loraq.load(tmp_path / "out")


@pytest.mark.parametrize("size", ["", "much", "0", "0GB", "-1GB", "2TB2"])
def test_a_size_that_is_none_is_wrong_usage(place, tmp_path, size):
    result = run("quantize", place / "float", tmp_path / "out", "--shard-size", size)
    assert result.exit_code == 2
    assert "is not a size. Write a number and a unit, such as 2GB or 500MB" in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("7", 7), ("2GB", 2 * 10**9), ("1.5 mb", 1_500_000), ("1GiB", 2**30), ("3k", 3000)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert size_option_value(None, None, text) == size


def test_quantize_goes_on_and_says_so(place, tmp_path, monkeypatch):
    def cut(_, work, jobs):
        yield work.open(Place(0, 0))(jobs[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "run", cut)
        result = run("quantize", place / "float", tmp_path / "out", *FAST)
    assert result.exit_code == 130
    assert (
        result.stderr.splitlines()[-1]
        == "Interrupted. 1 of 8 layers are kept; run the same command to go on."
    )
    assert "with other settings" in fails(
        "quantize", place / "float", tmp_path / "out", *FAST, "--seed", 9
    )
    result = run("quantize", place / "float", tmp_path / "out", *FAST)
    assert (
        "1 of them were finished before the last run was interrupted." in result.stdout.splitlines()
    )
    assert result.stderr.startswith("quantize: 7 layers, about ")
    assert result.stderr.splitlines()[1].startswith("quantize: layer 2 of 8, error 0.")


def test_quantize_gives_one_document(place, tmp_path):
    found = document("quantize", place / "float", tmp_path / "out", *FAST, "--seed", 3)
    assert found["target"] == str(tmp_path / "out")
    assert Recipe.from_dict(found["recipe"]) == replace(
        Recipe.named("mxfp4+w8a8-r8"), effort="fast", seed=3, keep="float"
    )
    assert len(found["layers"]) == 8
    assert found["layers"][0]["name"] == "transformer_blocks.0.attn1.to_q"
    errors = [layer["relative_error"] for layer in found["layers"]]
    assert found["mean_relative_error"] == pytest.approx(sum(errors) / 8)
    assert 4 < found["bits_per_weight"] < 16


def test_quantize_takes_a_recipe_file(place, tmp_path):
    (tmp_path / "recipe.toml").write_text('scheme = "int4+bf16-r4"\nmethod = "svdquant"\n')
    found = document(
        "quantize", place / "float", tmp_path / "out", "--recipe", tmp_path / "recipe.toml"
    )
    assert found["recipe"]["method"] == "svdquant"
    assert found["recipe"]["scheme"]["branch"]["rank"] == 4


def test_quantize_does_not_touch_a_target_that_is_not_empty(place, tmp_path):
    (tmp_path / "precious").touch()
    assert "the folder is not empty" in fails("quantize", place / "float", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_quantize_overwrites_when_it_is_told_to(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    assert "it is not a model's folder" in fails(
        "quantize", place / "float", tmp_path / "out", "--overwrite"
    )
    (tmp_path / "out" / "model.safetensors").touch()
    (tmp_path / "out" / "config.json").write_text('{"_class_name": "Net"}')
    command = ["quantize", place / "float", tmp_path / "out", "--overwrite", "--recipe", "mxfp4"]
    assert "it also holds old" in fails(*command)
    (tmp_path / "out" / "old").unlink()
    succeeds(*command, "--method", "rtn")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_command_that_has_ended_says_so_when_it_is_repeated(place, tmp_path):
    command = ["quantize", place / "float", tmp_path / "out", "--recipe", "mxfp4"]
    first = succeeds(*command)
    assert "Already complete" not in first
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = succeeds(*command)
    assert again.startswith("Already complete: made by the same settings from the same weights.\n")
    assert again.splitlines()[1:-1] == first.splitlines()[:-1]
    assert json.loads(succeeds(*command, "--json"))["already_complete"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "is not empty" in fails(*command[:-1], "int4")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--recipe", "mxfp5"), "Unknown number format 'mxfp5'. Did you mean 'mxfp4'?"),
        (("--recipe", "nowhere.toml"), "Cannot read the recipe 'nowhere.toml'"),
        (
            ("--method", "magic"),
            "Unknown method 'magic'. Known: gptq, loraq, lqer, qera, rtn, svdquant.",
        ),
        (("--budget", "plenty"), "plenty"),
        (("--recipe", "mxfp4+w8a8", "--budget", "2"), "transformer_blocks.0.attn1.to_q"),
        (("--recipe", "mxfp4+bf16-r999"), "Branch rank 999 is larger than min(out, in)"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_recipe_that_cannot_be_used_is_one_message(place, tmp_path, command, options, match):
    targets = [tmp_path / "out"] if command == "quantize" else []
    assert match in fails(command, place / "float", *targets, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quantize", "plan", "inspect", "compare"])
def test_a_folder_that_is_not_there_is_one_message(tmp_path, command):
    others = [tmp_path / "out"] if command in ("quantize", "compare") else []
    assert "nowhere' is not a folder" in fails(command, tmp_path / "nowhere", *others)


# --- plan -----------------------------------------------------------------------------------------


def test_plan_shows_every_layer_and_why_it_is_kept(place):
    text = succeeds("plan", place / "float", *FAST)
    lines = text.splitlines()
    headings = [
        "layer",
        "out×in",
        "weight",
        "activation",
        "branch",
        "rank",
        "size",
        "bits/weight",
        "why",
    ]
    assert lines[0].split() == headings
    assert len(lines) == 1 + 16 + 4
    shown = {line.split()[0]: line.split()[1:4] for line in lines[1:-4]}
    assert shown["transformer_blocks.0.attn1.to_q"] == ["32×32", "mxfp4", "mxfp4"]
    assert shown["transformer_blocks.0.attn2.to_k"] == ["32×32", "kept", "2.0"]
    assert "text-side projection of the cross-attention" in text
    assert lines[-4].startswith("8 layers quantized at ")
    assert lines[-4].endswith(" bits per weight, 8 kept.")
    assert lines[-1].startswith("Loaded, the model takes ")
    assert "Quantizing takes about" in lines[-1]
    assert "estimated_seconds" in document("plan", place / "float", *FAST)
    timed = succeeds("plan", place / "float", *FAST, "--time", "--device", "cpu")
    assert " s on cpu with one worker" in timed.splitlines()[-1]
    in_8_bits = succeeds("plan", place / "float", *FAST[:-2])
    assert "int8_b128 (kept)" in in_8_bits
    assert " bits per weight, 8 kept, 7 of them in 8 bits." in in_8_bits


def test_plan_gives_one_document_that_agrees_with_what_is_done(place):
    planned = document("plan", place / "float", *FAST)
    inspected = document("inspect", place / "quantized")
    schemes = {layer["name"]: layer["scheme"] for layer in planned["layers"] if layer["scheme"]}
    assert schemes == {name: layer["scheme"] for name, layer in inspected["layers"].items()}
    assert planned["nbytes"] < planned["nbytes_bf16"]
    assert planned["others"] == []
    kept = [layer for layer in planned["layers"] if layer["scheme"] is None]
    assert all(layer["reason"] for layer in kept)
    of_pipeline = document("plan", place / "pipeline", *FAST)
    (size,) = of_pipeline["sizes"]
    assert (size["name"], size["class_name"]) == ("transformer", "PixArt")
    assert size["nbytes"] < size["nbytes_bf16"]
    assert planned == of_pipeline | {"sizes": []}


def test_plan_counts_the_time_and_memory_of_as_many_workers_as_are_asked_for(place):
    text = succeeds("plan", place / "float", *FAST, "--time", "--workers", "3", "--device", "cpu")
    assert text.count(" with 3 workers") == 2
    one, three = (
        document("plan", place / "float", *FAST, "--workers", n, "--device", "cpu") for n in (1, 3)
    )
    assert (one["workers"], three["workers"]) == (1, 3)
    assert three["run_nbytes"] > one["run_nbytes"] > one["worker_nbytes"] == three["worker_nbytes"]
    assert f"Quantizing takes about {size_of(three['run_nbytes'])} with 3 workers." in text


def test_plan_for_a_device_takes_the_recipe_that_suits_it(place):
    advice = advice_for("hopper")
    text = succeeds("plan", place / "float", "--for", "hopper", *FAST[2:])
    assert text.startswith(f"For {advice.sentence}\n\nlayer ")
    planned = document("plan", place / "float", "--for", "hopper", *FAST[2:])
    assert planned["advice"]["backend"] == "fp8_row"
    activations = {layer["scheme"]["activation"] for layer in planned["layers"] if layer["scheme"]}
    assert activations == {"mxfp8_e4m3"}
    assert "Unknown device 'hoper'" in fails("plan", place / "float", "--for", "hoper")
    assert "not both" in run("plan", place / "float", "--for", "cpu", *FAST).stderr


def test_a_budget_sets_the_rank(place):
    small, large = (
        document("plan", place / "float", *FAST[-2:], "--recipe", "mxfp4+w8a8", "--budget", budget)
        for budget in ("r16=2", "r16=8")
    )
    ranks = [
        [layer["scheme"]["branch"]["rank"] for layer in p["layers"] if layer["scheme"]]
        for p in (small, large)
    ]
    assert all(a < b for a, b in zip(*ranks, strict=True))
    assert small["bits_per_weight"] < large["bits_per_weight"]


# --- inspect and compare --------------------------------------------------------------------------


def test_inspect_shows_every_layer(place):
    text = succeeds("inspect", place / "quantized")
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer",
        "out×in",
        "weight",
        "activation",
        "branch",
        "size",
        "error",
    ]
    assert len(lines) == 1 + 8 + 3
    assert "r8 mxint8/mxint8" in lines[1]
    assert lines[-3].startswith("8 quantized layers, ")
    assert lines[-1] == "All files are as they were written."
    assert succeeds("inspect", place / "quantized-pipeline") == (
        f"{text}So are the other files of the pipeline: 1.\n"
    )


@pytest.fixture
def pipeline(place, tmp_path) -> Path:
    """A quantized pipeline with a component of three files."""
    source = Path(shutil.copytree(place / "pipeline", tmp_path / "source"))
    (source / "vae").mkdir()
    for name in ("config.json", "a.bin", "b.bin"):
        (source / "vae" / name).write_text(name)
    succeeds("quantize", source, tmp_path / "out", *FAST)
    return tmp_path / "out"


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_inspect_checks_the_other_files_of_a_pipeline(pipeline, inner, monkeypatch):
    path = pipeline / inner
    assert "So are the other files of the pipeline: 4.\n" in succeeds("inspect", path)
    document = json.loads(succeeds("inspect", path, "--json"))
    files = {name: pipeline / name for name in ("vae/a.bin", "model_index.json")}
    assert document["components"]["checked"] is True
    assert len(document["components"]["files"]) == 4
    for name, file in files.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert document["components"]["files"][name] == {
            "bytes": file.stat().st_size,
            "sha256": digest,
        }
    monkeypatch.chdir(path)
    assert "So are the other files of the pipeline: 4.\n" in succeeds("inspect", ".")
    (pipeline / "vae" / "a.bin").write_text("A.bin")
    (pipeline / "vae" / "b.bin").unlink()
    text = fails("inspect", path)
    assert "Of 4 other files in" in text
    assert "2 are not as they were written: 'vae/b.bin' is missing, 'vae/a.bin' was changed" in text
    loraq.load(path)  # which looks at no other component


def test_inspect_says_that_a_transformer_stands_alone(pipeline, tmp_path):
    (pipeline / "transformer").rename(tmp_path / "alone")
    text = succeeds("inspect", tmp_path / "alone")
    assert "The other files of its pipeline (4) are not here, and were not checked.\n" in text
    document = json.loads(succeeds("inspect", tmp_path / "alone", "--json"))
    assert document["components"]["checked"] is False


def test_a_pipeline_whose_table_of_files_leads_out_is_refused(pipeline):
    path = pipeline / "transformer" / "loraq.json"
    manifest = json.loads(path.read_text())
    manifest["components"]["../secret"] = {"bytes": 0, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    assert "'components' names '../secret'" in run("inspect", pipeline).stderr
    with pytest.raises(LoraqError, match=r"'components' names '\.\./secret'"):
        loraq.load(pipeline)


def test_inspect_gives_one_document(place):
    found = document("inspect", place / "quantized")
    assert Recipe.from_dict(found["recipes"][0]).effort == "fast"
    layer = found["layers"]["transformer_blocks.0.ff.net.2"]
    assert layer["shape"] == [32, 128]
    assert layer["recipe"] == 0
    assert 0 < layer["relative_error"] < 0.2


def test_inspect_finds_a_changed_file(place, tmp_path):
    succeeds("quantize", place / "float", tmp_path / "out", *FAST)
    path = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert "was changed after it was written" in fails("inspect", tmp_path / "out")


def test_inspecting_a_float_folder_says_what_makes_a_quantized_one(place):
    assert "is not a loraq checkpoint" in fails("inspect", place / "float")
    assert "loraq quantize" in fails("inspect", place / "float")


def test_a_module_that_is_no_diffusers_model_can_be_inspected_and_compared(tmp_path):
    torch.manual_seed(0)
    for name, recipe in (("a", "mxfp4"), ("b", "int4")):
        model = nn.Sequential(nn.Linear(64, 32))
        loraq.quantize_(model, recipe, progress=False)
        loraq.save(model, tmp_path / name)
    assert "1 quantized layers" in succeeds("inspect", tmp_path / "a")
    assert len(document("compare", tmp_path / "a", tmp_path / "b")["layers"]) == 1


def test_compare_shows_every_layer_and_the_mean(place):
    text = succeeds("compare", place / "float", place / "quantized")
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "out×in", "error"]
    assert len(lines) == 1 + 8 + 1
    assert lines[-1].startswith("Mean relative error of 8 layers: 0.")
    assert succeeds("compare", place / "pipeline", place / "quantized-pipeline") == text


def test_compare_gives_one_document_that_agrees_with_the_records(place):
    found = document("compare", place / "float", place / "quantized")
    records = document("inspect", place / "quantized")["layers"]
    for layer in found["layers"]:
        assert layer["relative_error"] == pytest.approx(
            records[layer["name"]]["relative_error"], rel=1e-4
        )
    same = document("compare", place / "quantized", place / "quantized-pipeline")
    assert same["mean_relative_error"] == 0


def test_comparing_two_float_folders_is_one_message(place):
    assert "there is nothing to compare" in fails("compare", place / "float", place / "pipeline")


# --- formats and demo -----------------------------------------------------------------------------


def test_inspect_measures_the_memory_of_every_back_end(place):
    rows = {
        row["backend"]: row
        for row in document("inspect", place / "quantized", "--memory")["memory"]
    }
    names = ["reference", "resident", "low_memory", "int8_row", "openvino", "fp8_row", "triton"]
    assert list(rows) == ["float", "auto", *names]
    layers = document("inspect", place / "quantized")["layers"].values()
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    assert rows["auto"]["kept"] == rows["low_memory"]["kept"] == rows["reference"]["kept"] == 0
    # Decoded to bf16, the branch added: the memory of the model before beside the packed bytes.
    assert rows["resident"]["kept"] == rows["float"]["kept"] == 2 * weights
    assert rows["float"]["others"] == rows["auto"]["others"]
    assert rows["auto"]["packed"] < rows["float"]["kept"] / 2
    assert rows["int8_row"]["refused"] == len(layers)  # its activations are not INT8
    assert rows["low_memory"]["packed"] < weights
    files = sum(path.stat().st_size for path in (place / "quantized").glob("*.safetensors"))
    assert 0.8 * files < rows["low_memory"]["packed"] + rows["low_memory"]["others"] < files
    assert "layers refused" in succeeds("inspect", place / "quantized", "--memory")


# --- doctor ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_shows_the_machine_the_choices_and_its_numbers():
    report = document("doctor")
    assert set(report) == {"versions", "devices", "choices", "trials", "advice"}
    assert report["advice"]["why"]
    assert report["versions"]["torch"] == torch.__version__
    assert {trial["backend"] for trial in report["trials"]} >= {
        "resident",
        "low_memory",
        "int8_row",
    }
    assert all(
        trial["error"] <= trial["bound"] and trial["milliseconds"] > 0 for trial in report["trials"]
    )
    chosen = {(choice["weight"], choice["activation"]): choice for choice in report["choices"]}
    if "cuda:0" not in report["devices"]:
        assert chosen["int8", "int8"]["backend"] == "int8_row"
        assert chosen["mxfp4", "mxint8"]["backend"] == "low_memory"
        assert "not int8_row: its activations are 'mxint8'" in chosen["mxfp4", "mxint8"]["reason"]
        assert "activations run in 16 bits" in chosen["mxfp4", "mxint8"]["reason"]
        assert "16 bits" not in chosen["mxfp4", "bf16"]["reason"]


def test_doctor_fails_when_a_back_end_breaks_its_promise(monkeypatch):
    from loraq import doctor

    trial = doctor.Trial("mxfp4-a4", "resident", 0.5, 0.02, 1.0, 1.0)
    report = doctor.Report({}, {}, (), (trial,), advice_for("here"))
    monkeypatch.setattr(doctor, "examine", lambda: report)
    result = run("doctor")
    assert result.exit_code == 1
    assert "The self-test failed for 'resident' on 'mxfp4-a4' (0.5 > 0.02)" in result.stderr


@pytest.mark.slow
def test_doctor_goes_on_when_a_back_end_fails(monkeypatch):
    """It did not: on torch 2.7 to 2.10 one operator refused oneDNN's packed matrices."""
    from loraq import doctor

    def fail(*_):
        raise NotImplementedError("Cannot access storage of OpaqueTensorImpl")

    monkeypatch.setattr(type(BACKENDS["low_memory"]), "linear", fail)
    monkeypatch.setattr(doctor, "_TESTED", doctor._TESTED[:1])
    result = run("doctor")
    assert result.exit_code == 1
    assert "resident" in result.stdout
    assert "(NotImplementedError: Cannot access storage of OpaqueTensorImpl)" in result.stderr


def test_methods_lists_every_method_with_what_it_needs():
    from loraq.methods import METHODS

    lines = succeeds("methods").splitlines()
    assert lines[0].split()[:4] == ["method", "branch", "statistics", "efforts"]
    assert [line.split()[0] for line in lines[1:]] == sorted(METHODS)
    found = {row["method"]: row for row in document("methods")["methods"]}
    assert found["loraq"]["efforts"] == "fast, default, best"
    assert (found["gptq"]["statistics"], found["rtn"]["branch"]) == ("required", "none")
    assert "rounds" in found["svdquant"]["options"].split(", ")


def test_formats_lists_formats_grammar_and_recipes():
    text = succeeds("formats")
    assert text.splitlines()[0].split() == [
        "format",
        "bits",
        "block",
        "scale",
        "bits",
        "per",
        "value",
    ]
    for word in (
        "mxfp4",
        "nvfp4",
        "int4",
        "e8m0",
        "4.25",
        "MAIN[-aBITS][+BRANCH[-rRANK]][-s][-hSIDE]",
        "default",
        "mxfp4+w8a8",
    ):
        assert word in text


def test_formats_gives_one_document_whose_recipes_can_all_be_used():
    found = document("formats")
    assert {"mxfp4", "nvfp4", "int4", "int5", "bf16"} <= {row["format"] for row in found["formats"]}
    assert found["grammar"].startswith("MAIN")
    for name in found["recipes"]:
        Recipe.of(name)


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with two invented rows, because the real one takes minutes."""
    from loraq.evaluation import demo
    from loraq.evaluation.demo import DemoResult, DemoRow

    pictures = torch.zeros(10, 1, 8, 8)
    numbers = {
        "velocity_error": 0.02,
        "psnr_db": 30.0,
        "accuracy": 0.99,
        "frechet": 1.0,
        "seconds": 2.0,
    }
    group, trained = "weight-only", numbers | {"velocity_error": 0.0}
    better = numbers | {"velocity_error": 0.01}
    sizes = {"nbytes": 1024, "memory": 2048, "bits_per_weight": 5.0}
    rows = (
        DemoRow(
            group="as trained",
            label="bf16 weights",
            nbytes=2048,
            memory=4096,
            bits_per_weight=16.0,
            weight_error=0.0,
            **trained,
        ),
        DemoRow(
            group=group,
            label="LoRaQ",
            recipe="mxfp4-a16+w8a8",
            weight_error=0.07,
            **sizes,
            **numbers,
        ),
        DemoRow(
            group=group,
            label="SVDQuant",
            recipe="mxfp4-a16+bf16-r5",
            weight_error=0.08,
            **sizes,
            **better,
        ),
    )
    seen = {}

    def invented(subject, *, progress, **options):
        seen.update(options, about=subject.about)
        progress("[1 of 2] weight-only")
        return DemoResult(subject, rows, (pictures, pictures, pictures), options["effort"])

    monkeypatch.setattr(demo, "run", invented)
    return seen


def test_demo_prints_its_table_and_writes_the_report(small_demo, tmp_path):
    result = run("demo", "--out", tmp_path / "report", "--images", 12, "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert small_demo == {
        "every": False,
        "effort": "fast",
        "n_images": 12,
        "device": "auto",
        "workers": 1,
        "about": "of 5 million parameters that draws handwritten digits",
    }
    assert "[1 of 2]" in result.stderr
    assert "[1 of 2]" not in result.stdout
    assert "weight-only" in result.stdout
    # Also when LoRaQ does not win.
    assert "Best weight error: LoRaQ, velocity error: SVDQuant" in result.stdout
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!doctype html>")


def test_demo_of_the_emoji_model(small_demo, tmp_path):
    assets = Path(__file__).parents[1] / "benchmarks" / "assets" / "emoji"
    if not assets.is_dir():
        pytest.skip("only in a clone of the repository")
    document("demo", "--emoji", assets, "--out", tmp_path)
    assert "emoji" in small_demo["about"]
    assert small_demo["n_images"] is None  # as many as suit the model
    assert "has no 'captions.json'" in fails("demo", "--emoji", tmp_path, "--out", tmp_path)


def test_demo_gives_one_document(small_demo, tmp_path):
    found = document("demo", "--all", "--out", tmp_path)
    assert (small_demo["every"], small_demo["effort"]) == (True, "default")
    assert [row["label"] for row in found["rows"]] == ["bf16 weights", "LoRaQ", "SVDQuant"]
    assert Path(found["report"]).is_file()
    assert Path(found["picture"]).is_file()


def test_a_demo_row_without_any_difference_is_still_json(small_demo, tmp_path, monkeypatch):
    from loraq.evaluation import demo

    real = demo.run

    def exact(subject, **options):
        result = real(subject, **options)
        return replace(
            result, rows=(replace(result.rows[0], psnr_db=float("inf")), *result.rows[1:])
        )

    monkeypatch.setattr(demo, "run", exact)
    assert document("demo", "--out", tmp_path)["rows"][0]["psnr_db"] is None


def test_demo_says_before_it_starts_that_it_cannot_write(small_demo, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in fails("demo", "--out", tmp_path / "file")
    assert small_demo == {}


def test_demo_says_before_it_starts_that_matplotlib_is_missing(small_demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "loraq[demo]"' in fails("demo", "--out", tmp_path / "out")
    assert small_demo == {}


# --- report ---------------------------------------------------------------------------------------


def test_report_writes_a_page_beside_the_folder(place):
    page = place / "quantized.report.html"
    assert succeeds("report", place / "quantized") == f"Report: {page}\n"
    assert "PixArtTransformer2DModel" in page.read_text()
    found = document("report", place / "quantized-pipeline", "--out", place / "page.html")
    model = found["models"]["transformer"]
    assert (found["report"], model["layers"]) == (str(place / "page.html"), 8)
    assert model["differs_from_plan"] == []
    assert 0 < model["mean_relative_error"] < 0.2


def test_quantize_writes_the_report_too(place, tmp_path):
    text = succeeds("quantize", place / "float", tmp_path / "out", *FAST, "--report")
    page = tmp_path / "out.report.html"
    assert f"Report: {page}\n" in text
    first = page.read_bytes()
    found = document("quantize", place / "float", tmp_path / "out", *FAST, "--report")
    assert (found["already_complete"], found["report"]) == (True, str(page))
    succeeds("report", tmp_path / "out")
    assert page.read_bytes() == first


def test_quantize_refuses_a_report_before_it_starts(place, tmp_path):
    (tmp_path / "out.report.html").write_text("mine")
    text = fails("quantize", place / "float", tmp_path / "out", *FAST, "--report")
    assert "Will not replace" in text
    assert [path.name for path in tmp_path.iterdir()] == ["out.report.html"]


def test_a_report_of_a_float_folder_says_what_makes_a_quantized_one(place, tmp_path):
    assert "loraq quantize" in fails("report", place / "float", "--out", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# --- errors and interrupts ------------------------------------------------------------------------


def test_debug_shows_the_exception(tmp_path):
    result = run("inspect", tmp_path / "nowhere", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, CheckpointError)


def test_an_error_with_json_is_still_on_stderr_only(tmp_path):
    assert "is not a folder" in fails("inspect", tmp_path / "nowhere", "--json")


def test_an_interrupt_is_exit_code_130(place, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ranks, "run", interrupt)
    result = run("quantize", place / "float", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.splitlines()[1:] == ["Interrupted. Nothing was left."]
    assert not list(tmp_path.iterdir())


def test_a_missing_diffusers_is_one_message(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert 'pip install "loraq[diffusers]"' in fails("plan", place / "float")


def test_an_error_of_the_disk_is_one_message(place, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("loraq.integrations.checkpoints.plan_checkpoint", refuse)
    assert "Permission denied" in fails("plan", place / "float")


@pytest.mark.slow
def test_a_pipe_that_is_closed_is_no_error():
    program = "import sys; from loraq.cli import main; sys.argv[0] = 'loraq'; main(['formats'])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_one_file_without_a_configuration_is_told_what_it_misses(place):
    file = next((place / "float").glob("*.safetensors"))
    assert "Give --config" in run("plan", file).stderr
    assert "Give --config" not in run("plan", file, "--config", place / "float").stderr


def test_a_rotation_is_shown_beside_the_activation(place):
    assert "mxfp4 h32" in succeeds("plan", place / "float", "--recipe", "mxfp4-a4+w8a8-r4")


def test_names_of_strangers_are_shown_escaped_in_tables_and_exact_in_json(capsys):
    name = "a\x1b[2J\n\u202eb"
    print_table(("layer", "error"), [(name, "0.1"), ("größe [x]", "0.2")])
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "layer",
        r"a\x1b[2J\n\u202eb",
        "größe [x]",
    ]
    print_json({"layers": [{"name": name}]})
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert json.loads(text) == {"layers": [{"name": name}]}


# --- export ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exportable(place) -> Path:
    recipe = ("--recipe", "int4_b32-a16+bf16-r8", "--effort", "fast", "--keep", "float")
    succeeds("quantize", place / "float", place / "int4", *recipe)
    return place / "int4"


def test_export_lists_its_targets():
    text = succeeds("export", "--list")
    names = {target["name"] for target in document("export", "--list")["targets"]}
    assert {"sdnq", "gguf", "nunchaku-lite", "torchao", "dense"} <= names
    assert all(f"\n{name}\n" in f"\n{text}" for name in names)
    assert "not verified: " in text


def test_export_plans_and_writes_nothing(exportable, tmp_path):
    text = succeeds("export", exportable, tmp_path / "out", "--to", "sdnq", "--plan")
    assert "transformer_blocks.0.attn1.to_q" in text
    assert not (tmp_path / "out").exists()
    found = document("export", exportable, "--to", "sdnq", "--plan")
    assert found["written"] is None
    assert found["counts"]["exact"] == len(found["layers"])


def test_export_writes_and_says_how_it_is_loaded(exportable, tmp_path):
    text = succeeds("export", exportable, tmp_path / "out", "--to", "sdnq")
    assert f"Written to {tmp_path / 'out'}" in text
    assert "Activations there: 16 bits" in text
    assert "from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    found = document("export", exportable, tmp_path / "again", "--to", "dense")
    assert found["written"] == str(tmp_path / "again")
    assert found["target"] == "dense"


def test_export_stacks_loras(exportable, tmp_path):
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn1.to_q.lora"
    factors = {f"{name}_A.weight": torch.ones(2, 32), f"{name}_B.weight": torch.ones(32, 2)}
    save_file(factors, tmp_path / "style.safetensors")
    given = f"{tmp_path / 'style.safetensors'}:0.5"
    found = document("export", exportable, tmp_path / "out", "--to", "sdnq", "--lora", given)
    layer = found["layers"]["transformer_blocks.0.attn1.to_q"]
    assert layer["bytes"] > layer["bytes_before"]


def test_export_refuses_with_one_message(exportable, tmp_path):
    assert "Unknown target 'gguff'. Did you mean 'gguf'?" in fails(
        "export", exportable, tmp_path / "out", "--to", "gguff"
    )
    for arguments in ((), (exportable,), (exportable, tmp_path / "out")):
        result = run("export", *arguments)
        assert result.exit_code == 2
        assert "`loraq export --list` lists the targets" in " ".join(result.stderr.split())
