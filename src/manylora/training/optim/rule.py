"""What an optimiser is: a rule without memory, the state it asks for, and settings of its own. No torch.

A configuration is checked against what is declared here, so files of rules import torch in their functions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from manylora.settings import NoSettings

if TYPE_CHECKING:
    from torch import Tensor

    from manylora.training.optim.stacked import OptimizerSettings, SlotUpdate

Shape = tuple[int, ...]


class Rule:
    """How tensors are updated from their gradients: an entry of OPTIMIZERS is an object of a subclass.

    It holds nothing itself. `settings` is a frozen dataclass of what this optimiser alone can be told, declared as
    `manylora.settings` says. `state` names the tensors that it keeps beside each tensor it updates, as large as it
    unless `state_shapes` says otherwise. `decays` says that `update` itself applies decoupled weight decay; where it
    does not, that is done before it is called.
    """

    settings: ClassVar[type] = NoSettings
    state: ClassVar[tuple[str, ...]] = ()
    decays: ClassVar[bool] = False

    def state_shapes(self, shape: Shape, settings: OptimizerSettings) -> Mapping[str, Shape]:
        """The shape of each state of one tensor of a shape, by name; {}: none. All of them start at zero."""
        return dict.fromkeys(self.state, shape)

    def update(
        self,
        values: list[Tensor],
        grads: list[Tensor],
        state: Mapping[str, list[Tensor]],
        settings: SlotUpdate,
    ) -> None:
        """Update values and state in place, all by the same settings; `grads` are clipped and may be written over.

        Each value is (P, ...): the tensor of a site for P slots, one or more; `grads[i]` is as large, `state[name][i]`
        is (P, *shape) with the shape that `state_shapes` gave for (...). The slots know nothing of each other, so no
        number may depend on another of the first dimension.
        """
        raise NotImplementedError(f"{type(self).__name__} states no update")
