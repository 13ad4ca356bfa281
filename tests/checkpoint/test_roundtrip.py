"""Save and load: the same bytes, the same outputs, whatever the module looks like."""

import copy
import hashlib
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small.pixart import small_pixart, velocity
from torch import nn

import loraq
from loraq.checkpoint.manifest import Manifest
from loraq.errors import CheckpointError, KernelError
from loraq.layers import quantized_layers, swap
from loraq.nn import QuantizedConv1x1, QuantizedLinear
from loraq.recipe import Recipe
from loraq.rules import Rule
from loraq.safetensors.reader import ShardReader
from tests.folders import files_of

WIDTH = 48


class Net(nn.Module):
    """A little of everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH)
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.bare = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.table(index)
        x = self.norm(x + self.bare(nn.functional.gelu(self.first(x)))) + self.shift
        return self.head(self.last(x))


INDEX = torch.tensor([[1, 2, 3], [9, 0, 4]])
HEAD_STAYS = (Rule(match="head", skip=True),)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def quantized(
    recipe: str = "mxfp4+w8a8-r8", model: nn.Module | None = None, **changes
) -> nn.Module:
    model = net() if model is None else model
    recipe = replace(Recipe.named(recipe), **{"method": "lqer", "rules": HEAD_STAYS, **changes})
    loraq.quantize_(model, recipe, progress=False)
    return model


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "saved"


# --- bytes and outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "mxfp4",
        "mxfp4-a8+w6a6-r45",
        "mxfp4-a16+w4a8-r16",
        "mxfp4+bf16-r8",
        "nvfp4+w8a8-r8",
        "nvfp4+nvfp4-r8",
        "int4+bf16-r8",
        "mxint4+fp16-r3",
        "int5-a16",
        "fp8_e4m3",
        "mxfp6_e3m2+w8a8-r7",
    ],
)
def test_a_round_trip_changes_no_byte_and_no_output(recipe, folder):
    model = quantized(recipe)
    expected = model(INDEX)
    loraq.save(model, folder)
    loaded = net(seed=1)
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)
    assert torch.equal(loaded(INDEX), expected)
    for name, layer in quantized_layers(model).items():
        twin = loaded.get_submodule(name)
        assert twin.scheme == layer.scheme
        assert torch.equal(twin.reconstruct(), layer.reconstruct())


def test_the_global_scale_of_nvfp4_and_a_16_bit_branch_are_files_tensors(folder):
    loraq.save(quantized("nvfp4+bf16-r8"), folder)
    with safe_open(folder / "model.safetensors", framework="pt") as shard:
        names = set(shard.keys())
    assert {
        f"first.{leaf}" for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "bias")
    } <= names
    assert {"first.proj_up_packed", "first.proj_down_packed"} <= names
    assert not {"first.proj_up_scale", "first.weight", "bare.bias"} & names


def test_shards_hold_what_one_file_holds(tmp_path):
    model = quantized()
    loraq.save(model, tmp_path / "one")
    loraq.save(model, tmp_path / "many", shard_bytes=3000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in model.state_dict().values()
    )
    one, many = net(1), net(2)
    loraq.load_into(one, tmp_path / "one")
    loraq.load_into(many, tmp_path / "many")
    assert_same_state(one, many)
    assert_same_state(model, many)


def test_a_shard_is_no_larger_than_asked_unless_one_tensor_is(folder):
    model = quantized()
    loraq.save(model, folder, shard_bytes=3000)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            sizes = [shard.get_tensor(name).nbytes for name in shard.keys()]
        assert sum(sizes) <= 3000 or len(sizes) == 1


def test_a_shard_for_every_tensor(folder):
    model = quantized()
    loraq.save(model, folder, shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == len(model.state_dict())
    loaded = net(1)
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)


def test_the_same_seed_gives_the_same_bytes_of_every_file(tmp_path):
    for name in ("a", "b"):
        loraq.save(
            quantized("mxfp4+w8a8-r8", net(), method="loraq", effort="fast", seed=5),
            tmp_path / name,
        )
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert set(first) == {"loraq.json", "model.safetensors"}
    assert first == second


def test_a_saved_model_is_not_changed_by_saving(folder):
    model = quantized()
    before, output = copy.deepcopy(model), model(INDEX)
    loraq.save(model, folder)
    assert_same_state(before, model)
    assert torch.equal(model(INDEX), output)


def test_two_recipes_in_one_model(folder):
    model = quantized("mxfp4", rules=(Rule(match="[!f]*", skip=True),))
    quantized("int4+bf16-r8", model, rules=(Rule(match="bare", weight="int8"), *HEAD_STAYS), seed=3)
    assert {layer.scheme.weight for layer in quantized_layers(model).values()} == {
        "mxfp4",
        "int4",
        "int8",
    }
    loraq.save(model, folder)
    manifest = Manifest.read(folder)
    assert [recipe["seed"] for recipe in manifest.recipes] == [0, 3]
    assert {name: layer.record["recipe"] for name, layer in manifest.layers.items()} == {
        "first": 0,
        "bare": 1,
        "last": 1,
    }
    assert [manifest.record(name)["recipe"]["seed"] for name in ("first", "last")] == [0, 3]
    loaded = net(1)
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)
    assert torch.equal(loaded(INDEX), model(INDEX))


def test_records_survive_and_a_second_save_writes_the_same_bytes(tmp_path):
    model = quantized()
    loraq.save(model, tmp_path / "a")
    loaded = net(1)
    loraq.load_into(loaded, tmp_path / "a")
    record = quantized_layers(loaded)["first"].record
    assert record == quantized_layers(model)["first"].record
    assert Recipe.from_dict(record["recipe"]).method == "lqer"
    loraq.save(loaded, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_layer_without_a_record_is_saved_too(folder):
    solution = loraq.quantize_weight(torch.randn(8, 32), "mxfp4")
    model = nn.Sequential(QuantizedLinear.from_packed(solution.packed))
    loraq.save(model, folder)
    loaded = nn.Sequential(nn.Linear(32, 8, bias=False))
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)
    assert loaded[0].record == {}


def test_the_manifest_says_how_the_layers_came_to_be(folder):
    loraq.save(quantized(), folder)
    content = json.loads((folder / "loraq.json").read_text())
    assert content["format_version"] == 1
    assert content["versions"] == {"loraq": loraq.__version__, "torch": torch.__version__}
    assert Recipe.from_dict(content["recipes"][0]).seed == 0
    entry = content["layers"]["first"]
    assert entry["shape"] == [2 * WIDTH, WIDTH]
    assert 0 < entry["relative_error"] < 0.2
    assert len(entry["source_sha256"]) == 64
    assert entry["nbytes"] == loraq.Scheme("mxfp4", branch=loraq.Branch(8, "mxint8")).nbytes(
        (2 * WIDTH, WIDTH)
    )
    assert (
        content["files"]["model.safetensors"]["bytes"]
        == (folder / "model.safetensors").stat().st_size
    )


# --- sharing --------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A head that shares the embedding's weight, and a layer that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 32)
        self.layer = nn.Linear(32, 32)
        self.again = self.layer
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.layer(self.table(index))))


@pytest.mark.parametrize("on_meta", [False, True])
def test_tied_parameters_are_stored_once_and_tied_again(folder, on_meta):
    torch.manual_seed(0)
    model = quantized("mxfp4+bf16-r4", Tied())
    loraq.save(model, folder)
    assert Manifest.read(folder).tied["head.weight"] == "table.weight"
    with safe_open(folder / "model.safetensors", framework="pt") as shard:
        assert "head.weight" not in shard.keys()
        assert "again.weight_packed" not in shard.keys()
    with torch.device("meta" if on_meta else "cpu"):
        loaded = Tied()
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)
    assert loaded.head.weight is loaded.table.weight
    assert loaded.again is loaded.layer
    assert torch.equal(loaded(INDEX), model(INDEX))
    loraq.save(loaded, folder, overwrite=True)
    assert Manifest.read(folder).tied["head.weight"] == "table.weight"


def test_tied_parameters_in_shards(folder):
    model = quantized("mxfp4+bf16-r4", Tied())
    loraq.save(model, folder, shard_bytes=500)
    loaded = Tied()
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)


def test_parameters_that_are_views_of_one_tensor_are_stored_each(folder):
    model = quantized(
        "mxfp4", nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(8), nn.LayerNorm(8)), rules=()
    )
    both = torch.randn(16)
    model[1].weight, model[2].weight = nn.Parameter(both[:8]), nn.Parameter(both[8:])
    model[1].bias, model[2].bias = nn.Parameter(both[4:12]), nn.Parameter(torch.randn(8, 2)[:, 0])
    loraq.save(model, folder)
    loaded = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(8), nn.LayerNorm(8))
    loraq.load_into(loaded, folder)
    assert_same_state(model, loaded)


# --- targets --------------------------------------------------------------------------------------


def test_a_target_on_the_meta_device_lands_on_the_cpu(folder):
    model = quantized()
    loraq.save(model, folder)
    with torch.device("meta"):
        target = Net()
    loraq.load_into(target.eval(), folder)
    assert {tensor.device.type for tensor in target.state_dict().values()} == {"cpu"}
    assert_same_state(model, target)
    assert torch.equal(target(INDEX), model(INDEX))


@pytest.mark.parametrize("other", ["mxfp4+w8a8-r8", "int4", "nvfp4+bf16-r4"])
def test_a_quantized_target_takes_the_schemes_of_the_folder(folder, other):
    model = quantized()
    loraq.save(model, folder)
    target = quantized(other, net(1))
    loraq.load_into(target, folder)
    assert_same_state(model, target)
    assert torch.equal(target(INDEX), model(INDEX))


def test_every_tensor_has_the_dtype_it_was_saved_with(folder):
    model = quantized().to(torch.bfloat16)
    loraq.save(model, folder)
    target = net(1).double()
    loraq.load_into(target, folder)
    assert (
        target.norm.weight.dtype == target.first.bias.dtype == target.shift.dtype == torch.bfloat16
    )
    assert target.count.dtype == torch.int64
    assert_same_state(model, target)


def test_every_tensor_goes_to_the_device_of_the_one_it_replaces(folder, device):
    model = quantized()
    loraq.save(model, folder)
    target = net(1).to(device)
    loraq.load_into(target, folder)
    assert {tensor.device.type for tensor in target.state_dict().values()} == {device.type}
    assert_same_state(model, target.cpu())


def test_training_mode_and_gradients_of_what_stays_float_are_kept(folder):
    model = quantized()
    loraq.save(model, folder)
    target = net(1).train()
    target.norm.weight.requires_grad_(False)
    loraq.load_into(target, folder)
    assert all(module.training for module in target.modules())
    assert not target.norm.weight.requires_grad
    assert target.norm.bias.requires_grad
    assert not target.first.weight_packed.requires_grad


def test_a_back_end_is_chosen_by_name(folder):
    loraq.save(quantized(), folder)
    target = net(1)
    loraq.load_into(target, folder, backend="reference")
    assert target.first.backend == "reference"
    untouched = net(2)
    with pytest.raises(KernelError, match="resident"):
        loraq.load_into(untouched, folder, backend="cutlas")
    assert type(untouched.first) is nn.Linear


def test_a_target_may_be_shared_with_nobody(folder):
    model = quantized()
    loraq.save(model, folder)
    first, second = net(1), net(2)
    loraq.load_into(first, folder)
    loraq.load_into(second, folder)
    with torch.no_grad():
        first.norm.weight.zero_()
        first.first.weight_packed.zero_()
    assert_same_state(model, second)


# --- what cannot be saved -------------------------------------------------------------------------


def test_a_model_without_quantized_layers_is_not_saved(folder):
    with pytest.raises(CheckpointError, match="quantize_"):
        loraq.save(net(), folder)
    assert not folder.exists()


def test_a_bare_layer_is_not_saved(folder):
    layer = QuantizedLinear.from_packed(loraq.quantize_weight(torch.randn(8, 32), "mxfp4").packed)
    with pytest.raises(CheckpointError, match="no name"):
        loraq.save(layer, folder)
    assert not folder.exists()


def test_a_model_on_the_meta_device_is_not_saved(folder):
    with pytest.raises(CheckpointError, match="meta device"):
        loraq.save(quantized().to("meta"), folder)
    assert not folder.exists()
    assert not list(folder.parent.iterdir())


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_gives(folder, umask, mode):
    model = quantized()
    before = os.umask(umask)
    try:
        loraq.save(model, folder, shard_bytes=5000)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}


def test_parents_are_made_and_an_empty_folder_is_taken(tmp_path):
    model = quantized()
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c"):
        loraq.save(model, tmp_path / name)
        loraq.load_into(net(1), str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_relative_folder_and_one_with_dots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    loraq.save(quantized(), "here/../saved")
    loraq.load_into(net(1), "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "saved"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model-00001-of-00002.safetensors").touch()
    (tmp_path / "real" / "loraq.json").write_text('{"format_version": 1}')
    (tmp_path / "link").symlink_to("real")
    loraq.save(quantized(), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "real" / "model-00001-of-00002.safetensors").exists()
    loraq.load_into(net(1), tmp_path / "real")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


# --- a diffusers model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixart():
    pytest.importorskip("diffusers")
    model = small_pixart(torch.float32, num_layers=1)
    return quantized("mxfp4+w8a8-r8", model, rules=())


@pytest.mark.parametrize("shard_bytes", [2_000_000_000, 10_000])
def test_a_diffusers_model_is_built_from_its_folder(pixart, folder, shard_bytes):
    loraq.save(pixart, folder, shard_bytes=shard_bytes)
    loaded = loraq.load(folder)
    assert type(loaded) is type(pixart)
    assert not loaded.training
    config = dict(loaded.config)
    assert config.pop("_name_or_path") == str(folder)  # as diffusers notes it
    stated = config.pop("quantization_config").recipe
    assert stated == pixart.config.quantization_config.recipe
    assert {key: pixart.config[key] for key in config} == config
    assert_same_state(pixart, loaded)
    assert torch.equal(velocity(loaded), velocity(pixart))
    assert (folder / "diffusion_pytorch_model.safetensors").exists() == (shard_bytes > 10_000)


def test_a_diffusers_model_that_was_loaded_is_saved_with_the_same_bytes(pixart, tmp_path):
    loraq.save(pixart, tmp_path / "a")
    loraq.save(loraq.load(tmp_path / "a"), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_configuration_says_that_the_weights_are_quantized(pixart, folder):
    loraq.save(pixart, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "loraq"}
    assert config["_class_name"] == "PixArtTransformer2DModel"


# --- 1×1 convolutions -----------------------------------------------------------------------------


def conv_net(width: int = 45) -> nn.Module:
    """Widths that are no multiple of any block, around a convolution that stays."""
    torch.manual_seed(0)
    steps = (
        nn.Conv2d(7, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.Conv2d(width, 19, 1),
    )
    return nn.Sequential(*steps, nn.Flatten(2), nn.Linear(20, 33)).eval()


PICTURE = torch.linspace(-1, 1, 2 * 7 * 20).view(2, 7, 4, 5)


@pytest.mark.parametrize("recipe", ["mxfp4+w8a8-r5", "nvfp4+w6a6-r3", "int4+bf16-r2", "int5-a16"])
def test_convolutions_of_odd_widths_come_back_as_convolutions(tmp_path, recipe):
    model = quantized(recipe, conv_net(), rules=())
    assert {name: type(layer) for name, layer in quantized_layers(model).items()} == {
        "0": QuantizedConv1x1,
        "3": QuantizedConv1x1,
        "5": QuantizedLinear,
    }
    loraq.save(model, tmp_path / "saved")
    fresh = conv_net()
    loraq.load_into(fresh, tmp_path / "saved")
    assert_same_state(fresh, model)
    assert [type(layer) for layer in quantized_layers(fresh).values()] == [
        QuantizedConv1x1,
        QuantizedConv1x1,
        QuantizedLinear,
    ]
    with torch.no_grad():
        assert torch.equal(fresh(PICTURE), model(PICTURE))
    loraq.load_into(fresh, tmp_path / "saved")  # into the quantized one
    with torch.no_grad():
        assert torch.equal(fresh(PICTURE), model(PICTURE))


def test_the_source_hash_of_a_convolution_is_that_of_its_tensor(tmp_path):
    model = conv_net()
    raw = model[0].weight.detach().numpy().tobytes()
    quantized("mxfp4", model, rules=())
    assert model[0].record["source_sha256"] == hashlib.sha256(raw).hexdigest()


def test_a_matrix_does_not_go_into_a_larger_convolution(tmp_path):
    loraq.save(quantized("mxfp4", conv_net(), rules=()), tmp_path / "saved")
    other = conv_net()
    other[3] = nn.Conv2d(45, 19, 3, padding=1)
    with pytest.raises(
        CheckpointError,
        match=r"Layer '3' is Conv2d.*The checkpoint has a linear layer of shape \(19, 45\)",
    ):
        loraq.load_into(other, tmp_path / "saved")


def test_a_tensor_stands_where_torch_would_place_it(tmp_path):
    # Sums of BLAS depend on the alignment; in the mapped file these start at odd places.
    tensors = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = ShardReader(tmp_path)
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.data_ptr() % 64 == 0
        assert torch.equal(read, tensor)


# --- all or nothing -------------------------------------------------------------------------------


def everything_of(model: nn.Module) -> dict[str, object]:
    """Every module, parameter, buffer and hook by name, the objects themselves."""
    return {
        **{f"module {name}": id(m) for name, m in model.named_modules(remove_duplicate=False)},
        **{f"tensor {name}": id(t) for name, t in model.named_parameters(remove_duplicate=False)},
        **{f"tensor {name}": id(t) for name, t in model.named_buffers(remove_duplicate=False)},
        **{f"hooks {name}": list(m._forward_hooks) for name, m in model.named_modules()},
    }


@pytest.mark.parametrize("failure", [OSError("I/O error"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("start", [net, lambda: quantized("int4", net(3))])
def test_a_failure_at_any_tensor_leaves_the_module_as_it_was(folder, monkeypatch, start, failure):
    model = quantized()
    loraq.save(model, folder)
    target, n_tensors = start(), len(model.state_dict())
    target.first.register_forward_hook(lambda *_: None)
    before, state, expected = everything_of(target), target.state_dict(), target(INDEX)
    state = {name: tensor.clone() for name, tensor in state.items()}
    read = ShardReader.read
    for k in range(n_tensors):
        n_read = iter(range(n_tensors))

        def fail_at_k(reader, name, n_read=n_read, k=k):
            if next(n_read) == k:
                raise failure
            return read(reader, name)

        monkeypatch.setattr(ShardReader, "read", fail_at_k)
        with pytest.raises(type(failure)):
            loraq.load_into(target, folder)
        assert everything_of(target) == before
        assert all(torch.equal(target.state_dict()[name], state[name]) for name in state)
        assert torch.equal(target(INDEX), expected)
    monkeypatch.setattr(ShardReader, "read", read)
    loraq.load_into(target, folder)
    assert_same_state(model, target)


def test_an_interrupted_swap_leaves_the_tables_as_they_were():
    class Interrupted(dict):
        def __setitem__(self, key, value):
            if value == "stop":
                raise KeyboardInterrupt
            super().__setitem__(key, value)

    first, second = {"a": 1}, Interrupted(b=2, c=3)
    with pytest.raises(KeyboardInterrupt):
        swap([(first, "a", 10), (second, "b", 20), (second, "c", "stop")])
    assert (first, dict(second)) == ({"a": 1}, {"b": 2, "c": 3})
