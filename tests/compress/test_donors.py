"""Components of other checkpoints: a copy of the base changes nothing, another is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import ggufs
import tiny
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import Component, find_components, weight_of
from divergent_tokens.compress.donors import Donor
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import SchemeError
from divergent_tokens.models import Model, load_model
from divergent_tokens.quiet import quietly


def save(network: PreTrainedModel, folder: Path) -> Path:
    with quietly():
        network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny.network("llama"), tmp_path_factory.mktemp("donors") / "llama")


def assert_nothing_changes(network: PreTrainedModel, path: Path) -> None:
    components = find_components(network, include=["*"])
    donor = Donor(str(path))
    donor.check(components)
    for component in components:
        weight = weight_of(network, component)
        kept = weight.clone()
        found = donor.compress(weight, component)
        assert torch.equal(found, kept), component.name
        assert found.dtype == weight.dtype
        assert torch.equal(weight, kept)


@pytest.mark.parametrize("name", ggufs.NAMES)
def test_a_float32_gguf_of_the_base_changes_nothing(name: str, tmp_path: Path) -> None:
    network = tiny.network(name)
    assert_nothing_changes(network, ggufs.write(tmp_path / "base.gguf", name, network))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_folder_of_the_base_changes_nothing(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    network = tiny.network(name).to(dtype)
    assert_nothing_changes(network, save(network, tmp_path / "base"))


@pytest.mark.demo
def test_the_demo_donates_itself() -> None:
    model = load_model("demo:smollm2")
    assert_nothing_changes(model.network, Path("demo:smollm2"))


def test_another_network_s_components_are_lent_and_given_back(tmp_path: Path) -> None:
    base, other = tiny.network("qwen3-moe"), tiny.network("qwen3-moe", seed=1)
    path = ggufs.write(tmp_path / "other.gguf", "qwen3-moe", other)
    components = find_components(base, include=["*"])
    originals = [weight_of(base, component).clone() for component in components]
    plan = uniform_plan(components, Scheme((Donor(str(path)),)))
    model = Model(base, tiny.tokenizer(), "base", "0" * 64)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = base(ids).logits
        with lent_plan(model, plan, components=components):
            for component in components:
                assert torch.equal(weight_of(base, component), weight_of(other, component))
            during = base(ids).logits
        assert torch.equal(base(ids).logits, before)
        taken = {component.parameter for component in components}
        for name, parameter in base.named_parameters():
            if name not in taken:  # norms and routers
                other.get_parameter(name).copy_(parameter)
        torch.testing.assert_close(during, other(ids).logits)
    for component, original in zip(components, originals, strict=True):
        assert torch.equal(weight_of(base, component), original)


def test_the_text_and_what_it_says_of_itself(folder: Path) -> None:
    donor = Donor("a:b/c+int4")
    assert str(donor) == "from:a:b/c+int4"
    assert donor == Donor("a:b/c+int4")
    assert hash(donor) == hash(Donor("a:b/c+int4"))
    assert not donor.by_rows
    assert Donor(str(folder)).activations is None


def test_a_donor_is_not_touched_before_it_is_checked() -> None:
    missing = Donor("/nowhere/at/all.gguf")
    assert str(missing) == "from:/nowhere/at/all.gguf"
    components = find_components(tiny.network("llama"))
    with pytest.raises(SchemeError, match=r"from:/nowhere/at/all\.gguf: .*does not exist"):
        missing.check(components)


def test_files_that_change_are_read_again(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    network = tiny.network("llama")
    component = find_components(network)[0]
    donor = Donor(str(copy))
    weight = weight_of(network, component)
    source = donor.source
    assert torch.equal(donor.compress(weight, component), weight)
    assert source == Donor(str(folder)).source, "the same files, wherever they lie"
    tensors = {name: 2 * tensor for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, tmp_path / "new", {"format": "pt"})
    shutil.move(tmp_path / "new", copy / "model.safetensors")
    assert torch.equal(donor.compress(weight, component), 2 * weight)
    assert donor.source != source


# --- refused ---


def refused(path: Path, components: tuple[Component, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Scheme((Donor(str(path)),)).check(components)


def test_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    components = find_components(tiny.network("qwen3"))
    refused(folder, components, "is of the architecture 'llama', and the base is 'qwen3'")
    path = ggufs.write(tmp_path / "x.gguf", "llama", tiny.network("llama"))
    refused(path, components, "architecture 'llama', and the base is 'qwen3'; expected 'qwen3'")


def test_other_shapes_are_refused(folder: Path, tmp_path: Path) -> None:
    padded = find_components(tiny.network("llama-padded"), include=["*embed_tokens"])
    message = r"has model.embed_tokens as \[256, 32\], and the base as \[293, 32\]"
    refused(folder, padded, message)
    path = ggufs.write(tmp_path / "x.gguf", "llama", tiny.network("llama"))
    refused(path, padded, message)


def test_a_missing_component_is_named(folder: Path, tmp_path: Path) -> None:
    components = find_components(tiny.network("llama"))
    path = ggufs.write(
        tmp_path / "x.gguf", "llama", tiny.network("llama"), leave_out="blk.1.ffn_down"
    )
    refused(path, components, r"has no model\.layers\.1\.mlp\.down_proj \(expected blk\.1\.ffn_d")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(copy, components, r"lacks weights .*model\.layers\.1\.mlp\.down_proj")


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    network = tiny.network("llama")
    component = next(c for c in find_components(network) if c.name.endswith("1.mlp.down_proj"))
    with pytest.raises(SchemeError, match=r"NaN or infinite weights in .*1\.mlp\.down_proj"):
        Donor(str(copy)).compress(weight_of(network, component), component)
