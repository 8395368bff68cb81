"""One frozen base, many adapters, one forward path.

    base = manylora.load_base("folder-or-id")
    bank = manylora.Bank(base, num_slots=2)
    bank.put(manylora.Adapter.load("folder"), slot=0)
    with bank.route([0, 0, -1]):                       # one slot for each row of the batch; -1 is the bare base
        logits = base.model(input_ids=tokens).logits

torch and transformers are imported when a name below is first used, not before.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manylora.adapters.adapter import Adapter
    from manylora.adapters.bank import Bank
    from manylora.adapters.compress.compressed import compress
    from manylora.adapters.merge import MergeReport, merge
    from manylora.base.frozen import FrozenModel
    from manylora.base.load import load_base
    from manylora.config import Config, load_config
    from manylora.errors import ManyloraError, UserError
    from manylora.generation.decode import Generation, generate
    from manylora.quant import pack
    from manylora.spec import AdapterSpec
    from manylora.training.run import Result

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Bank",
    "Config",
    "FrozenModel",
    "Generation",
    "ManyloraError",
    "MergeReport",
    "Result",
    "UserError",
    "__version__",
    "compress",
    "generate",
    "load_base",
    "load_config",
    "merge",
    "pack",
    "sweep",
    "train",
]

_HOMES = {
    "Adapter": "manylora.adapters.adapter",
    "AdapterSpec": "manylora.spec",
    "Bank": "manylora.adapters.bank",
    "Config": "manylora.config",
    "FrozenModel": "manylora.base.frozen",
    "Generation": "manylora.generation.decode",
    "ManyloraError": "manylora.errors",
    "MergeReport": "manylora.adapters.merge",
    "Result": "manylora.training.run",
    "UserError": "manylora.errors",
    "compress": "manylora.adapters.compress.compressed",
    "generate": "manylora.generation.decode",
    "load_base": "manylora.base.load",
    "load_config": "manylora.config",
    "merge": "manylora.adapters.merge",
    "pack": "manylora.quant",
}


def train(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    base: FrozenModel | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    use_cache: bool = True,
) -> Result:
    """The run folder and summary of one trained adapter.

    `config` is a YAML file, a mapping of the same keys, or a `Config`; `overrides` are laid over it as
    `{"a.b": value}` or `["a.b=value"]`. `resume` goes on from the last checkpoint of the output folder.

    What Python holds already may be handed over in place of `base`, `data.train` and `data.eval` of the configuration:
    a base that `load_base` made, or `FrozenModel(module)` with `task: module`; a list, iterable or data set of rows
    (mappings), a `datasets.Dataset`, or for a module a `torch.utils.data.Dataset` of (input, ..., class number).

    Raises:
        UserError: a mistake in the configuration, the data or the base; the message says what to change.
    """
    from manylora.training.run import train as run_training

    made, objects = _handed(config, overrides, {"base": base, "data.train": train_data, "data.eval": eval_data})
    return run_training(made, resume=resume, objects=objects, use_cache=use_cache)


def sweep(
    config: str | Path | Mapping[str, Any] | Config,
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    base: FrozenModel | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    use_cache: bool = True,
) -> Result:
    """The run folder and summary of a search over the keys in the configuration's section `sweep`.

    The arguments are those of `train`. The winner lies in `adapters/best` of the folder, every trial in
    `leaderboard.csv` and `sweep.json`.

    Raises:
        UserError: a mistake in the configuration, the data or the base; the message says what to change.
    """
    from manylora.sweeps.run import sweep as run_sweep

    made, objects = _handed(config, overrides, {"base": base, "data.train": train_data, "data.eval": eval_data})
    return run_sweep(made, resume=resume, objects=objects, use_cache=use_cache)


def _handed(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] | Mapping[str, Any],
    given: Mapping[str, Any],
) -> tuple[Config, dict[str, Any]]:
    """A checked configuration that names each object given in place of a key, and the objects by these names."""
    from collections.abc import Mapping

    from manylora.config import Config, load_config
    from manylora.config_text import parse_override

    handed = {key: value for key, value in given.items() if value is not None}
    names = {key: f"python:{key.removeprefix('data.')}" for key in handed}
    pairs = dict(overrides) if isinstance(overrides, Mapping) else dict(map(parse_override, overrides))
    made = load_config(config.to_dict() if isinstance(config, Config) else config, pairs | names)
    return made, {names[key]: value for key, value in handed.items()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'manylora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
