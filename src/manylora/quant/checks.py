"""What a format accepts: weights, options, and tensors that come back from disk. Nothing is guessed or repaired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manylora.errors import BaseBroken, ConfigError, PackError, UnknownName, nearest_names

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2.0**126
"""The largest magnitude of the affine formats: the range of a group and its dense values stay finite in float32."""


def checked_weight(weight: Tensor, name: str) -> Tensor:
    """The weight without its graph.

    Raises:
        PackError: not 2-D, not floating, empty, or on the meta device.
    """
    if weight.ndim != 2:
        raise PackError(
            f"{name} cannot store a weight of shape {_shape(weight)}",
            allowed="2-D weights (O, I)",
            next_step="reshape it to 2-D, or leave this weight as it is",
        )
    if weight.dtype not in DTYPES:
        raise PackError(
            f"{name} cannot store a weight of dtype {short_dtype(weight.dtype)}",
            allowed=", ".join(map(short_dtype, DTYPES)),
        )
    if weight.numel() == 0:
        raise PackError(f"{name} cannot store a weight of shape {_shape(weight)}: it holds no value")
    if weight.is_meta:
        raise PackError(f"{name} cannot store a weight on the meta device: it has no values", next_step="load it first")
    return weight.detach()


def not_finite(weight: Tensor, name: str) -> PackError:
    """The error that names the first value of a weight that is not finite as float32."""
    columns = weight.shape[1]
    for row, values in enumerate(weight):
        bad = (~values.float().isfinite()).nonzero()
        if len(bad):
            column = int(bad[0])
            value = float(values[column])
            beyond = f", beyond float32's {torch.finfo(torch.float32).max:.4g}" if abs(value) < float("inf") else ""
            return PackError(
                f"the weight holds {value} in row {row}, column {column}{beyond}; {name} stores finite values only",
                next_step="check the checkpoint: a weight with such a value cannot be used in any format",
            )
    raise AssertionError(f"all {weight.shape[0]} x {columns} values are finite")


def check_magnitude(weight: Tensor, largest: Tensor, name: str) -> None:
    """Refuse a chunk whose groups have these largest magnitudes unless all are finite and at most LARGEST.

    Raises:
        PackError: names the place of a value that is not finite, or the magnitude.
    """
    # One number crosses to the host: NaN passes through `max`.
    top = float(largest.max())
    if top <= LARGEST:
        return
    if top < float("inf"):
        raise PackError(
            f"the weight holds a value of magnitude {top:.4g}; {name} stores magnitudes up to {LARGEST:.4g}"
        )
    raise not_finite(weight, name)


def check_options(given: Mapping[str, Any], known: tuple[str, ...], name: str) -> None:
    """Refuse an option that a format does not have.

    Raises:
        UnknownName: names the nearest options.
    """
    for option in given:
        if option not in known:
            raise UnknownName(
                f"{name} has no option called {option!r}",
                nearest=nearest_names(option, known),
                allowed=", ".join(known),
            )


def checked_flag(value: Any, option: str, name: str) -> bool:
    """The option as a bool.

    Raises:
        ConfigError: anything but True and False.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{option} of {name} is {value!r}", allowed="true, false")
    return value


def checked_size(value: Any, option: str, name: str) -> int:
    """The option as a number of weights.

    Raises:
        ConfigError: anything but a whole number from 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{option} of {name} is {value!r}", allowed="a whole number of weights, 1 or more")
    return value


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dense_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that no weight is made dense in.

    Raises:
        ConfigError: lists those that are.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            f"a packed weight cannot be made dense in {short_dtype(dtype)}", allowed=", ".join(map(short_dtype, DTYPES))
        )


class Stored:
    """The tensors and settings of one packed weight from disk, taken one by one; `done` refuses what is left."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]):
        self._name = name
        self._tensors = dict(tensors)
        self._settings = dict(settings)
        if self._settings.pop("format", None) != name:
            raise BaseBroken(f"the packed weight is stored as {settings.get('format')!r}, not as {name!r}")

    def setting(self, key: str, *kinds: type) -> Any:
        """One setting of one of these kinds.

        Raises:
            BaseBroken: missing or of another kind.
        """
        if key not in self._settings:
            raise BaseBroken(
                f"the {self._name} weight has no setting {key!r}", allowed=", ".join(self._settings) or None
            )
        value = self._settings.pop(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BaseBroken(
                f"setting {key!r} of the {self._name} weight is {value!r}",
                allowed=" or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds),
            )
        return value

    def shape(self) -> tuple[int, int]:
        """The setting `shape` as (O, I).

        Raises:
            BaseBroken: missing, or not two whole numbers from 1.
        """
        shape = self.setting("shape", list, tuple)
        if len(shape) != 2 or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise BaseBroken(
                f"setting 'shape' of the {self._name} weight is {shape!r}", allowed="two whole numbers, O and I"
            )
        return shape[0], shape[1]

    def group_size(self, value: int) -> int:
        """A setting that counts the weights of a group.

        Raises:
            BaseBroken: below 1.
        """
        if value < 1:
            raise BaseBroken(f"setting 'block' of the {self._name} weight is {value}", allowed="1 or more")
        return value

    def tensor(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """One tensor of this dtype and shape, contiguous.

        Raises:
            BaseBroken: missing, of another dtype or shape, or with a value that is not finite.
        """
        if key not in self._tensors:
            raise BaseBroken(
                f"the {self._name} weight has no tensor {key!r}", allowed=", ".join(self._tensors) or "there is none"
            )
        tensor = self._tensors.pop(key).detach()
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise BaseBroken(
                f"tensor {key!r} of the {self._name} weight is {short_dtype(tensor.dtype)} {_shape(tensor)}",
                allowed=f"{short_dtype(dtype)} ({', '.join(map(str, shape))})",
                next_step="the file is cut off or was written by something else: pack the weight again",
            )
        if dtype.is_floating_point and not bool(tensor.isfinite().all()):
            raise BaseBroken(f"tensor {key!r} of the {self._name} weight holds a value that is not finite")
        return tensor.contiguous()

    def inverse_step(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A float32 tensor of positive numbers.

        Raises:
            BaseBroken: as `tensor`, or a number that is zero or below.
        """
        tensor = self.tensor(key, torch.float32, shape)
        if not bool((tensor > 0).all()):
            raise BaseBroken(f"tensor {key!r} of the {self._name} weight holds a number that is not positive")
        return tensor

    def done(self) -> None:
        """Refuse whatever was not taken.

        Raises:
            BaseBroken: names it.
        """
        left = [*(f"tensor {key!r}" for key in self._tensors), *(f"setting {key!r}" for key in self._settings)]
        if left:
            raise BaseBroken(f"the {self._name} weight holds what this format does not: {', '.join(left)}")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
