"""Any torch module: its outputs are scores of classes, a row's label is the number of its class."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.evaluation.sample import Metrics, Sample


class ModuleClasses:
    """Nothing is generated, so nothing is scored but loss and accuracy, which the objective gives.

    It learns from data sets of torch, and from no format of text.
    """

    name = "module"
    auto = ""
    kinds = ()
    causal = False
    objective = "classification"

    def metrics(self, samples: Sequence[Sample]) -> Metrics:
        """None: a module writes no text."""
        return {}

    def footnotes(self, samples: Sequence[Sample]) -> dict[str, str]:
        """None."""
        return {}


MODULE = ModuleClasses()
