"""Any torch module: its outputs are scores of classes, a row's label is the number of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manylora.base.frozen import FrozenModel
from manylora.errors import ConfigError
from manylora.tasks.data import object_of, tensor_data
from manylora.tasks.task import Scored

if TYPE_CHECKING:
    from manylora.config import Config
    from manylora.tasks.data import RunData


class ModuleClasses:
    """Nothing is generated, so nothing is scored but loss and accuracy, which the objective gives.

    It learns from data sets of torch, and from no format of text.
    """

    name = "module"
    auto = ""
    objective = "classification"

    def find(self, config: Config, objects: Mapping[str, Any]) -> None:
        """Nothing: a data set of torch is there or it is not."""

    def open(self, config: Config, objects: Mapping[str, Any]) -> FrozenModel:
        base = object_of(config.base, objects, "base") if config.base.startswith("python:") else None
        if isinstance(base, FrozenModel):
            return base.probed()
        raise ConfigError(
            f"the task {config.task} adapts a torch module, and base is {config.base!r}",
            next_step="manylora.train(config, base=manylora.FrozenModel(module), train_data=...)",
        )

    def row_tokens(self, config: Config, base: FrozenModel) -> tuple[int, list[str]]:
        return config.train.row_tokens, []

    def read(
        self, config: Config, base: FrozenModel, found: None, objects: Mapping[str, Any], *, use_cache: bool
    ) -> RunData:
        return tensor_data(config, base, objects)

    def outputs(self, data: RunData) -> int | None:
        return None

    def score(self, base: FrozenModel, examples: Sequence[Any], config: Config, *, slot: int) -> Scored:
        return Scored()

    def record(self, config: Config, base: FrozenModel) -> Mapping[str, Any]:
        return {}


MODULE = ModuleClasses()
