"""Load a base: the one that ships with manylora, a folder in Hugging Face format, or a hub id."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from manylora.base.fingerprint import folder_fingerprint, read_header, weight_files
from manylora.base.language import LanguageBase, stop_ids
from manylora.base.packing.stored import Stored, stored_format
from manylora.errors import BaseBroken, BaseNotFound, ConfigError, UserError, nearest_names
from manylora.settings import dtype_of_name

if TYPE_CHECKING:
    import torch

BUILTIN = Path(__file__).parent / "builtin"
DTYPES = ("bfloat16", "float16", "float32", "float64")


def builtin_names() -> list[str]:
    """The bases that ship with manylora, as `builtin:NAME`."""
    return [f"builtin:{path.parent.name}" for path in sorted(BUILTIN.glob("*/config.json"))]


def find_base(name: str, *, weights: bool = True) -> Path:
    """The folder of a base: builtin, local, or downloaded from the hub into its own cache, with its weights or without.

    Raises:
        BaseNotFound: nothing is there, or the hub cannot be reached. BaseBroken: a folder without config.json.
    """
    if name.startswith("builtin:"):
        if name not in builtin_names():
            raise BaseNotFound(f"no base is called {name!r}", nearest=nearest_names(name, builtin_names()),
                               allowed=", ".join(builtin_names()))  # fmt: skip
        return BUILTIN / name.removeprefix("builtin:")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseBroken(f"{folder} is no model folder: it has no config.json", next_step=_hint(folder))
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        siblings = [str(path) for path in folder.parent.glob("*") if path.is_dir()] if folder.parent.is_dir() else []
        raise BaseNotFound(
            f"no base at {name!r}",
            nearest=nearest_names(str(folder), [*siblings, *builtin_names()]),
            allowed=f"a folder in Hugging Face format, a hub id (owner/name), {', '.join(builtin_names())}",
        )
    return _download(name, weights)


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "this is an adapter: name its base, and give the adapter apart"
    return "give a folder that model.save_pretrained wrote"


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of several libraries; the cause is kept and shown
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        raise BaseNotFound(
            f"{name!r} is neither a folder nor a model that the hub gave ({type(error).__name__})",
            nearest=nearest_names(name, builtin_names()),
            allowed=f"a folder in Hugging Face format, a hub id (owner/name), {', '.join(builtin_names())}",
            next_step="unset HF_HUB_OFFLINE to download it" if offline else "check the name and the connection",
        ) from error


def choose_device(device: str) -> tuple[Any, str]:
    """The torch device and a line that says why.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"device cuda ({torch.cuda.get_device_name()}): chosen because it is there"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "device mps: chosen because it is there"
        return torch.device("cpu"), "device cpu: no accelerator is there"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {device!r} cannot be used: {reason}", allowed="auto, cpu, cuda, cuda:N, mps"
        ) from error
    return chosen, f"device {device}: as asked"


def choose_dtype(dtype: str | torch.dtype, device: Any) -> tuple[Any, str]:
    """The torch dtype of the frozen weights and a line that says why.

    Raises:
        ConfigError: a name that is no dtype for weights.
    """
    import torch

    dtype = dtype_of_name(str(dtype))
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}", nearest=nearest_names(dtype, DTYPES), allowed=", ".join(DTYPES))
    if dtype == "bfloat16" and device.type == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        if not supported():
            return torch.float32, "dtype float32: this CPU has no bfloat16 products, so bfloat16 would be slower"
        return torch.bfloat16, "dtype bfloat16: this CPU multiplies it natively"
    return getattr(torch, dtype), f"dtype {dtype}: as asked"


def load_base(
    name: str,
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "auto",
    quantize: str | None = None,
    auto: str = "AutoModelForCausalLM",
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
) -> LanguageBase:
    """A frozen base, ready for a bank: loaded, fingerprinted and probed.

    `quantize` names the format in which the linear weights are packed as they are read (nf4, fp4, int8, int4). A folder
    that is packed already (`manylora quantize`, or bitsandbytes' 4 bits) is taken as it is. `auto` is the transformers
    class that the task loads it through; `chat_template` is a file that replaces the tokenizer's own template.

    Raises:
        BaseNotFound: nothing is at `name`. BaseBroken: no weights, a damaged file, tensors missing or left over.
        ConfigError: `quantize` names another format than the one that the folder is packed in.
    """
    check_auto(auto)
    folder = find_base(name)
    for path in weight_files(folder):
        read_header(path)
    chosen_device, why_device = choose_device(device)
    chosen_dtype, why_dtype = choose_dtype(dtype, chosen_device)
    stored = check_quantize(name, folder, quantize)
    fingerprint = folder_fingerprint(folder)
    notes = [why_device, why_dtype]
    if quantize is None and (stored is None or not stored.readable):
        model = load_dense(folder, auto, chosen_dtype, trust_remote_code).to(chosen_device)
    else:
        from manylora.base.packing.quantise import PackReport, load_packing, load_stored, packer

        settings: Any = {"dtype": chosen_dtype, "device": chosen_device, "trust_remote_code": trust_remote_code}
        with reading(folder):
            if stored is not None and stored.format is not None:
                report = PackReport(stored.format)
                model = load_stored(folder, stored, auto, report, **settings)
            else:
                report = PackReport(str(quantize))
                model = load_packing(
                    folder, auto, packer(report.format), report, **settings,
                    load_whole=lambda dtype: load_dense(folder, auto, dtype, trust_remote_code),
                )  # fmt: skip
        notes += report.notes(chosen_device)
    with reading(folder):
        tokenizer = _tokenizer(folder, trust_remote_code)
    _set_template(tokenizer, chat_template)
    return LanguageBase(
        model.to(chosen_device),
        tokenizer=tokenizer,
        name=base_name(name),
        folder=folder,
        fingerprint=fingerprint,
        notes=notes,
    ).probed()


def base_name(name: str) -> str:
    """The name that is written into what is made from a base: a folder by its whole path."""
    return name if name.startswith("builtin:") or not Path(name).exists() else str(Path(name).resolve())


def check_quantize(name: str, folder: Path, quantize: str | None) -> Stored | None:
    """How the folder's weights are stored (None: dense), passed where they can be loaded in the format asked for.

    Raises:
        UnknownName: no such format. ConfigError: the weights are packed already, in another one.
    """
    stored = stored_format(folder)
    if quantize is None:
        return stored
    from manylora.quant import PACKINGS

    PACKINGS.check(quantize)
    if stored is not None and stored.format != quantize:
        held = stored.format or f"what {stored.maker} wrote"
        raise ConfigError(
            f"quantize is {quantize!r}, and {name} is packed already, in {held}",
            allowed=f"null or {stored.format}" if stored.readable else "null",
            next_step="give the original base, or leave quantize out to take this one as it is packed",
        )
    return stored


def check_auto(auto: str) -> None:
    """Refuse a task whose base is no model of transformers.

    Raises:
        ConfigError: there is no such Auto class.
    """
    import transformers

    if not auto:
        raise ConfigError(
            "this task learns from tensors by a torch module, which only Python can hand over: no folder holds one",
            next_step="manylora.train(config, base=manylora.FrozenModel(module), train_data=...); it evaluates too",
        )
    if not hasattr(transformers, auto):
        raise ConfigError(f"transformers has no class {auto!r}", next_step="give the name of an Auto class")


def load_dense(folder: Path, auto: str, dtype: Any, trust_remote_code: bool) -> Any:
    """The model as transformers itself loads it; `dtype` None: in the dtype of the files.

    Raises:
        BaseBroken: it cannot, or tensors are missing.
    """
    import transformers

    with reading(folder):
        model, info = getattr(transformers, auto).from_pretrained(
            folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, use_safetensors=True,
            output_loading_info=True, local_files_only=True,
        )  # fmt: skip
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise BaseBroken(
            f"{folder} lacks {len(missing)} tensors of a {type(model).__name__}, the first is {missing[0]!r}",
            next_step="the folder is incomplete, or was saved from another class of model",
        )
    return model


@contextlib.contextmanager
def reading(folder: Path):
    """Within it transformers is quiet, and what it raises about the folder's files is a `BaseBroken`."""
    with _quiet():
        try:
            yield
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _unreadable(folder, error) from error


def load_tokenizer(
    name: str, chat_template: str | Path | None = None, *, trust_remote_code: bool = False
) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a base and the tokens at which its generation stops, as `load_base` finds them; no weights.

    Raises:
        BaseNotFound: nothing is at `name`. BaseBroken: no tokenizer, or no configuration of a model.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = find_base(name, weights=False)
    with reading(folder):
        tokenizer = _tokenizer(folder, trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            generation = GenerationConfig.from_model_config(config)
    _set_template(tokenizer, chat_template)
    return tokenizer, stop_ids(SimpleNamespace(generation_config=generation, config=config), tokenizer)


def _set_template(tokenizer: Any, chat_template: str | Path | None) -> None:
    if chat_template is None:
        return
    path = Path(chat_template)
    if not path.is_file():
        raise BaseNotFound(f"no chat template at {str(path)!r}", next_step="give a file that holds a Jinja template")
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def _unreadable(folder: Path, error: Exception) -> BaseBroken:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    step = "set trust_remote_code: true if you trust its code" if "trust_remote_code" in str(error) else None
    return BaseBroken(f"transformers cannot load {folder}: {reason}", next_step=step)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise BaseBroken(f"{folder} has no tokenizer", next_step="tokenizer.save_pretrained(folder)")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


@contextlib.contextmanager
def _quiet():
    """Loading without transformers' bars and reports: what matters is raised or noted."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
