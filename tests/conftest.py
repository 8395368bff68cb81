"""What every test shares: its threads, no network, a tiny random base, and where further data is found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads that spin while they wait starve each other forty-fold when the machine is busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("MANYLORA_DEBUG", None)
# Workers share the cores: one thread each, and in the processes that their tests start.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, os.cpu_count() or 1))

# A Python that a test starts runs the sitecustomize.py there, which refuses connections beyond this machine too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "support" / "process"), os.environ.get("PYTHONPATH")])
)

import network
import pytest
from guards import unwritten_is_nan
from hypothesis import settings

network.forbid()

# By default fewer examples: `make test-all` takes them all.
settings.register_profile("default", max_examples=50, deadline=None)
settings.register_profile("all", deadline=None)
settings.load_profile(os.environ.get("MANYLORA_HYPOTHESIS", "default"))

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manylora.adapters.adapter import Adapter
    from manylora.base.language import LanguageBase

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"]


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _no_connection_was_refused() -> Iterator[None]:
    """A test fails that asked for another machine, even where the code swallowed the refusal."""
    network.refused.clear()
    yield
    assert not network.refused, f"connections beyond this machine were asked for: {', '.join(network.refused)}"


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    if any(request.node.get_closest_marker(name) for name in ("unwritten", "alone")):
        yield
        return
    with unwritten_is_nan():
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Encoded rows of tests lie with the tests, and those of the user are neither read nor added to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Llama of two layers, a byte-level BPE tokenizer and a chat template."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-base")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog", "name : value | name : value"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets that are too large for the repository; tests that need it carry the mark needs_data."""
    named = os.environ.get("MANYLORA_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("set MANYLORA_TEST_DATA to the folder with the larger data sets")
    return folder


BYTE_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role == 'assistant' %}{{ raise_exception('users speak first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BYTE_SPECIAL = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: place for place, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(BYTE_SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=BYTE_TEMPLATE
    )


@pytest.fixture
def base() -> LanguageBase:
    """A two-layer Llama with random weights in float32 and a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from manylora.base.language import LanguageBase

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + len(BYTE_SPECIAL), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3,
        eos_token_id=256, pad_token_id=257, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LanguageBase(LlamaForCausalLM(config), tokenizer=byte_tokenizer(), name="tiny").probed()


@pytest.fixture
def adapters(base: LanguageBase) -> list[Adapter]:
    """Two adapters whose b is not zero, so that they change what the base says."""
    import torch

    from manylora.adapters.adapter import Adapter
    from manylora.spec import AdapterSpec
    from manylora.types import Factors

    made = []
    for seed in (1, 2):
        adapter = Adapter.new(base, AdapterSpec(rank=4, alpha=8.0), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        factors = {
            name: Factors(f.method, {k: 0.3 * torch.randn(t.shape, generator=generator) for k, t in f.tensors.items()})
            for name, f in adapter.factors.items()
        }
        made.append(Adapter(adapter.spec, factors, adapter.base_name, adapter.base_fingerprint))
    return made
