"""Weights packed as they are read: the model of an ordinary load packed in place, whatever the folder looks like."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.load import load_base, load_dense
from manylora.base.packing.folder import quantise_folder
from manylora.base.packing.linear import PackedLinear
from manylora.base.packing.quantise import PackReport, load_packing, packer
from manylora.errors import BaseBroken, ConfigError, OutputExists, UnknownName
from manylora.quant import PACKINGS
from manylora.spec import AdapterSpec
from manylora.types import dense_parameters

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {"vocab_size": 97, "max_position_embeddings": 64, "initializer_range": 0.2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, **SHARED, num_key_value_heads=2, tie_word_embeddings=True),
    "llama untied": lambda: transformers.LlamaConfig(**SMALL, **SHARED, tie_word_embeddings=False),
    "llama with biases": lambda: transformers.LlamaConfig(**SMALL, **SHARED, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, **SHARED, num_key_value_heads=2, head_dim=8, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, vocab_size=97,
        init_std=0.2,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **SHARED, num_key_value_heads=2, num_local_experts=4),
    "bert": lambda: transformers.BertConfig(**SMALL, **SHARED),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def auto_of(kind: str) -> str:
    return "AutoModelForMaskedLM" if kind == "bert" else "AutoModelForCausalLM"


def written(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a random model."""
    torch.manual_seed(0)
    model = getattr(transformers, auto_of(kind)).from_config(CONFIGS[kind]())
    model.to(dtype).save_pretrained(folder)
    return folder


def streamed(kind: str, folder: Path, name: str, dtype: torch.dtype) -> tuple[nn.Module, PackReport]:
    report = PackReport(name)
    model = load_packing(
        folder, auto_of(kind), packer(name), report, dtype=dtype, device=CPU, trust_remote_code=False,
        load_whole=lambda wanted: load_dense(folder, auto_of(kind), wanted, False),
    )  # fmt: skip
    return model.eval(), report


def dense(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model but for those that hold packed weights."""
    return {
        f"{name}.{key}": own for name, module in model.named_modules() for key, own in dense_parameters(module).items()
    }


def ordinary(kind: str, folder: Path, name: str, dtype: torch.dtype, like: nn.Module) -> nn.Module:
    """transformers' own load, with the dense weight of its codes at every site that `like` has packed."""
    model = load_dense(folder, auto_of(kind), dtype, False)
    exact = load_dense(folder, auto_of(kind), None, False)
    for site, module in like.named_modules():
        if isinstance(module, PackedLinear):
            weight = exact.get_submodule(site).weight.detach()
            weight = weight.t().contiguous() if module.transposed else weight
            dense = PACKINGS.get(name).pack(weight).dense(dtype)
            model.get_submodule(site).weight = nn.Parameter(dense.t() if module.transposed else dense)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_streamed_base_is_the_ordinary_one_packed_in_place(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = written(kind, tmp_path / "base")
    got, report = streamed(kind, folder, "nf4", dtype)
    want = ordinary(kind, folder, "nf4", dtype, got)
    for kept, other in ((dense(got), dense(want)), (dict(got.named_buffers()), dict(want.named_buffers()))):
        values = other
        for name, value in kept.items():
            assert value.dtype == values[name].dtype, name
            assert torch.equal(value, values[name]), name
    assert dict(got.named_buffers()).keys() == dict(want.named_buffers()).keys()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(got(input_ids=tokens).logits, want(input_ids=tokens).logits)
    assert (report.whole is None) == (kind != "mixtral")
    assert report.num_sites == sum(isinstance(module, PackedLinear) for module in got.modules()) > 0


def test_the_head_and_the_embeddings_stay_dense_and_tied(tmp_path: Path) -> None:
    got, report = streamed("llama", written("llama", tmp_path / "base"), "nf4", torch.bfloat16)
    assert report.left_dense == {"lm_head": "the head"}
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert {parameter.dtype for parameter in dense(got).values()} == {torch.bfloat16}
    assert report.dense_bytes["Embedding"] == 97 * 32 * 2


def test_a_model_whose_tensors_are_made_of_others_is_loaded_whole_and_says_so(tmp_path: Path) -> None:
    got, report = streamed("mixtral", written("mixtral", tmp_path / "base"), "nf4", torch.float32)
    assert "converts" in report.whole
    assert any("loaded whole" in note for note in report.notes(CPU))
    assert any("MixtralExperts" in note for note in report.notes(CPU)), "most of this model is not packed"
    assert not any(p.is_meta for p in got.parameters())


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """GPT-2's own files name `h.0...`, where the model has `transformer.h.0...`."""
    folder = written("gpt2", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.masked_bias"] = torch.zeros(())  # an old buffer that no model has any more
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    got, report = streamed("gpt2", folder, "int8", torch.float32)
    assert report.whole is None
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        want = ordinary("gpt2", folder, "int8", torch.float32, got)(input_ids=tokens).logits
        assert torch.equal(got(input_ids=tokens).logits, want)


def split(folder: Path, parts: int = 3) -> list[str]:
    """Cut model.safetensors into files with an index."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{place % parts + 1:05d}-of-{parts:05d}.safetensors" for place, name in enumerate(tensors)}
    for file in set(files.values()):
        held = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sorted(set(files.values()))


def test_a_checkpoint_of_several_files_is_the_same_base(folder: Path) -> None:
    tokens = torch.arange(12)[None]
    whole = load_base(str(folder), dtype="float32", quantize="nf4")
    names = split(folder)
    parts = load_base(str(folder), dtype="float32", quantize="nf4")
    assert parts.fingerprint == whole.fingerprint
    assert torch.equal(parts.model(tokens).logits, whole.model(tokens).logits)
    (folder / names[1]).unlink()
    with pytest.raises(BaseBroken, match=names[1]):
        load_base(str(folder), dtype="float32", quantize="nf4")


@pytest.mark.parametrize("name", list(PACKINGS))
def test_a_base_packed_at_load_keeps_its_fingerprint_and_says_what_was_done(name: str, folder: Path) -> None:
    dense = load_base(str(folder), dtype="float32")
    packed = load_base(str(folder), dtype="float32", quantize=name)
    assert packed.fingerprint == dense.fingerprint
    assert packed.num_parameters() == dense.num_parameters()
    assert packed.sites.keys() == dense.sites.keys()
    assert packed.dtype == torch.float32
    notes = "\n".join(packed.notes)
    assert f"packed as {name}: 14 linear weights" in notes
    assert "lm_head (the head)" in notes
    tokens = torch.arange(20)[None]
    got, want = packed.model(tokens).logits, dense.model(tokens).logits
    assert 0 < (got - want).norm() < 0.5 * want.norm()


def test_lora_and_copies_of_everything_start_at_the_packed_base_to_the_bit(folder: Path) -> None:
    base = load_base(str(folder), dtype="bfloat16", quantize="nf4")
    inputs = base.example(3)
    want = base.model(**inputs, use_cache=False).logits
    bank = Bank(base, num_slots=2)
    bank.put(Adapter.new(base, AdapterSpec(rank=4, dropout=0.1), seed=1), slot=0)
    bank.put(Adapter.new(base, AdapterSpec(method="full", sites=("everything",)), seed=1), slot=1)
    for slots in ([0, 0, 0], [1, 1, 1], [0, 1, -1]):
        with bank.route(slots, [1, 2, 3]):
            logits = base.model(**inputs, use_cache=False).logits
        assert torch.equal(logits, want)
    with bank.route([0, 1, 0], [1, 2, 3]):
        base.model(**inputs, use_cache=False).logits.float().sum().backward()
    assert all(stack.tensors[key].grad is not None for stack in bank.stacks.values() for key in stack.tensors)


def test_a_packed_head_in_a_checkpoint_is_made_dense(folder: Path) -> None:
    """bitsandbytes packs what it is not told to skip; the head here is chunked, adapted and tied as a dense one."""
    tensors = load_file(folder / "model.safetensors")
    packed = PACKINGS.get("nf4").pack(tensors["model.embed_tokens.weight"])
    for short, tensor in packed.tensors().items():
        key = "lm_head.weight" if short == "codes" else f"lm_head.weight.{short}"
        tensors[key] = tensor.clone()
    settings = packed.settings()
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": settings["shape"],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": settings["nested_offset"],
    }  # fmt: skip
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["lm_head.weight.quant_state.bitsandbytes__nf4"] = raw
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    base = load_base(str(folder), dtype="float32")
    assert torch.equal(base.head.weight, packed.dense(torch.float32))
    assert all(site.packed is None for site in base.sites.values())


def test_a_format_that_is_not_there_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UnknownName, match="nf5") as caught:
        load_base(str(folder), quantize="nf5")
    assert "nf4" in caught.value.nearest


def test_missing_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseBroken, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(folder), quantize="nf4")


def test_a_weight_that_cannot_be_packed_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_base(str(folder), quantize="nf4")


# -- packed folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PACKINGS))
def test_a_packed_folder_is_the_base_packed_at_load(name: str, folder: Path, tmp_path: Path) -> None:
    result = quantise_folder(str(folder), tmp_path / "packed", name)
    at_load = load_base(str(folder), dtype="float32", quantize=name)
    shutil.rmtree(folder)  # it loads without the original
    stored = load_base(str(tmp_path / "packed"), dtype="float32")
    tokens = torch.arange(12)[None]
    assert torch.equal(stored.model(tokens).logits, at_load.model(tokens).logits)
    assert stored.fingerprint == at_load.fingerprint == result.fingerprint
    assert stored.tokenizer_digest == at_load.tokenizer_digest
    assert stored.template_digest == at_load.template_digest
    assert stored.eos_ids == at_load.eos_ids
    assert {name: site.packed is None for name, site in stored.sites.items()} == {
        name: site.packed is None for name, site in at_load.sites.items()
    }


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "llama with biases"])
def test_packed_folders_of_other_architectures_hold_every_tensor(kind: str, folder: Path, tmp_path: Path) -> None:
    written(kind, folder)
    quantise_folder(str(folder), tmp_path / "packed", "nf4")
    at_load = load_base(str(folder), quantize="nf4")
    stored = load_base(str(tmp_path / "packed"))
    tokens = torch.arange(12)[None]
    assert torch.equal(stored.model(tokens).logits, at_load.model(tokens).logits)


def test_the_error_table_is_the_measured_error(folder: Path, tmp_path: Path) -> None:
    result = quantise_folder(str(folder), tmp_path / "packed", "int4", {"block": 16})
    tensors = load_file(folder / "model.safetensors")
    weights = [value.double() for name, value in tensors.items() if name.endswith("up_proj.weight")]
    dense = [PACKINGS.get("int4").pack(w.float(), block=16).dense(torch.float32).double() for w in weights]
    error = sum((d - w).square().sum() for d, w in zip(dense, weights, strict=True)).sqrt()
    assert result.losses["up_proj"].relative_error == pytest.approx(
        float(error / sum(w.square().sum() for w in weights).sqrt()), rel=1e-9
    )
    assert result.losses["up_proj"].num_sites == 2
    assert result.total.num_weights == sum(w.numel() for n, w in tensors.items() if "_proj" in n)
    files = load_file(tmp_path / "packed" / "packed.safetensors")
    assert result.bytes_after == sum(tensor.nbytes for tensor in files.values())
    assert result.bytes_before == sum(tensor.nbytes for tensor in tensors.values())


def test_a_folder_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine.txt").write_text("kept")
    with pytest.raises(OutputExists, match=r"mine\.txt"):
        quantise_folder(str(folder), tmp_path / "packed", "nf4")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["mine.txt"]


def test_a_packed_base_is_not_packed_again(folder: Path, tmp_path: Path) -> None:
    quantise_folder(str(folder), tmp_path / "packed", "nf4")
    with pytest.raises(ConfigError, match="packed already, in nf4"):
        load_base(str(tmp_path / "packed"), quantize="int8")
    with pytest.raises(ConfigError, match="packed already"):
        quantise_folder(str(tmp_path / "packed"), tmp_path / "again", "nf4")
    assert load_base(str(tmp_path / "packed"), quantize="nf4").sites


def test_a_packed_folder_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    quantise_folder(str(folder), packed, "nf4")
    config = json.loads((packed / "config.json").read_text())
    sites = config["quantization_config"]["sites"]
    sites["model.layers.0.mlp.up_proj"]["nested_offset"] += 1.0
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseBroken, match="not as it was packed"):
        load_base(str(packed))
    shutil.rmtree(packed)
    quantise_folder(str(folder), packed, "nf4")
    tensors = load_file(packed / "packed.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight.codes"][0] ^= 1
    save_file(tensors, packed / "packed.safetensors")
    with pytest.raises(BaseBroken, match="not as it was packed"):
        load_base(str(packed))


def test_transformers_does_not_take_a_packed_folder_for_a_dense_one(folder: Path, tmp_path: Path) -> None:
    quantise_folder(str(folder), tmp_path / "packed", "nf4")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_large_base_is_written_as_several_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.base.packing.folder.FILE_BYTES", 10_000)
    quantise_folder(str(folder), tmp_path / "packed", "nf4")
    files = sorted(path.name for path in (tmp_path / "packed").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"packed-00001-of-{len(files):05d}.safetensors"
    load_base(str(tmp_path / "packed"))


# -- what others packed ------------------------------------------------------------------------------------------------


def bitsandbytes_folder(folder: Path, model: str, *, double: bool, kind: str, storage: str) -> None:
    """A checkpoint that transformers wrote with bitsandbytes, of widths that its product on the CPU can take."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if model == "llama":
        sizes = SMALL | {"hidden_size": 128, "intermediate_size": 256}
        config: Any = transformers.LlamaConfig(**sizes, **SHARED, num_key_value_heads=2)
    else:
        config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=97, n_positions=64,
                                         bos_token_id=0, eos_token_id=0, initializer_range=0.2)  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="float32", bnb_4bit_quant_storage=storage,
    )  # fmt: skip
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    (folder / "model.safetensors").unlink()
    packed.save_pretrained(folder)


@pytest.mark.parametrize(
    ("double", "kind", "storage"),
    [(True, "nf4", "uint8"), (False, "nf4", "uint8"), (True, "fp4", "uint8"), (True, "nf4", "bfloat16")],
)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, and of transformers' way with it
def test_a_bitsandbytes_checkpoint_loads_as_it_is(
    model: str, double: bool, kind: str, storage: str, folder: Path
) -> None:
    bitsandbytes_folder(folder, model, double=double, kind=kind, storage=storage)
    from bitsandbytes.functional import dequantize_4bit

    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    base = load_base(str(folder), dtype="float32")
    assert not any("bitsandbytes" in type(module).__module__ for module in base.model.modules())
    packed = [site for site in base.sites.values() if site.packed is not None]
    assert len(packed) == {"llama": 14, "gpt2": 8}[model]
    for site in packed:
        assert site.packed.format == kind
        weight = own.get_submodule(site.name).weight
        assert torch.equal(site.weight(), dequantize_4bit(weight.data, weight.quant_state).view(site.out_in))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        got, want = base.model(tokens).logits, own(tokens).logits
    # Its product on a CPU with AVX-512 rounds the scales to bfloat16, a part in 256 each.
    assert (got - want).norm() < 2e-2 * want.norm()
    assert load_base(str(folder), dtype="float32", quantize=kind).fingerprint == base.fingerprint
    with pytest.raises(ConfigError, match=f"packed already, in {kind}"):
        load_base(str(folder), quantize="int8")


def test_the_fingerprint_of_a_bitsandbytes_checkpoint_is_of_its_own_tensors(folder: Path) -> None:
    bitsandbytes_folder(folder, "llama", double=True, kind="nf4", storage="uint8")
    first = load_base(str(folder)).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_base(str(folder)).fingerprint != first


def test_a_bitsandbytes_checkpoint_with_a_damaged_state_is_refused(folder: Path) -> None:
    bitsandbytes_folder(folder, "llama", double=True, kind="nf4", storage="uint8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"][0] = 65
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseBroken, match=r"state of .*up_proj"):
        load_base(str(folder))
    del tensors["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseBroken, match="up_proj"):
        load_base(str(folder))


def test_what_an_unknown_method_packed_is_not_packed_again(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="what gptq wrote"):
        load_base(str(folder), quantize="nf4")


# -- memory ------------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from pathlib import Path
from manylora.base.load import find_base, reading
from manylora.base.packing.quantise import PackReport, load_packing, packer

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

def load(folder):
    report = PackReport("nf4")
    with reading(folder):
        model = load_packing(folder, "AutoModelForCausalLM", packer("nf4"), report, dtype=torch.bfloat16,
            device=torch.device("cpu"), trust_remote_code=False, load_whole=lambda dtype: None)
    assert report.whole is None
    return model, report

torch.set_num_threads(1)
load(find_base("builtin:tiny-en"))  # whatever is imported once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model, report = load(Path(sys.argv[1]))
rest = sum(p.nbytes for p in model.parameters())
print(status("VmHWM") - before, report.bytes_after + rest, max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_holds_the_packed_model_and_one_tensor(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8, vocab_size=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    told = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "base")], check=True, capture_output=True, text=True
    )
    peak, packed, largest = map(int, told.stdout.split())
    dense = (tmp_path / "base" / "model.safetensors").stat().st_size
    scratch = 32e6  # of packing a million weights at a time, whatever the size of the model
    assert peak <= 1.1 * (packed + largest) + scratch, f"{peak:,} above the start for {packed:,} packed"
    assert peak < 0.65 * dense, f"{peak:,} above the start for {dense:,} dense"
