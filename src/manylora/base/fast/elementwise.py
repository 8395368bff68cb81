"""The element-wise ops of `manylora.ops.elementwise` in a model that knows nothing of them.

A module that is shown to compute one of them becomes an instance of a subclass of its own class, with another forward.
So the class, and every other model of the process, stays as it is; the module keeps its parameters, its name and its
hooks; and whoever replaces `module.forward`, and calls `type(module).forward` inside, reaches the op.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from manylora.base.fast.attention import FAR
from manylora.base.fast.forms import GateForm, NormForm, Rotation, find_gate, find_norm, find_rotation
from manylora.types import dtype_of

FORM = "_manylora_form"
"""The attribute of a switched module that holds what it was found to compute."""
PLAIN = "_manylora_plain_class"
"""The attribute of a switched module's class that holds the class it had."""
ROTARY = "apply_rotary_pos_emb"
"""The name by which the attention of transformers' models calls its rotation, a function of the modelling module."""

Form = NormForm | GateForm | Rotation
"""What a module was found to compute; of an attention module, what rotates."""


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A module and what it computes."""

    module: nn.Module
    form: Form

    def switch(self) -> None:
        self.module.__dict__[FORM] = self.form
        self.module.__class__ = _switched(type(self.module), self.form if isinstance(self.form, Rotation) else None)


def use_elementwise(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """Have a model compute its element-wise parts through these ops, if it then gives the same states; the note.

    `run`: the states of some packed rows. It is called before and after. What is not recognised, and what `run` does
    not come by, is left as it is; if the states differ or it fails, each kind of op is tried by itself.
    """
    dtype = dtype_of(model) or torch.float32
    kinds: dict[str, list[_Found]] = {}
    for each in _find(model, dtype):
        kinds.setdefault(each.form.kind, []).append(each)
    refused: dict[str, str] = {}
    if kinds:
        with torch.enable_grad():  # of so few tokens, and without gradients, the ops would take their plain forms
            before = run().detach()
            if _tried([each for group in kinds.values() for each in group], run, before, dtype) is not None:
                refused = {kind: why for kind, group in kinds.items() if (why := _tried(group, run, before, dtype))}
    for kind, group in kinds.items():
        if kind not in refused and not any(each.form.taken for each in group):
            refused[kind] = "is never called as it was tried"
            _restore(group)
    used = Counter(vars(module)[FORM].kind for module in model.modules() if FORM in vars(module))
    parts = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(used.items())]
    notes = [f"computed in few passes over memory: {', '.join(parts)}"] if used else []
    notes += [f"the model's own {kind} is kept: ours {why}" for kind, why in refused.items()]
    return "; ".join(notes) or "element-wise parts are computed by the model's own code: none is known here"


def forms_of(model: nn.Module) -> dict[str, Form]:
    """What the modules of a model that were switched compute, by name."""
    return {name: vars(module)[FORM] for name, module in model.named_modules() if FORM in vars(module)}


def take_forms(model: nn.Module, forms: Mapping[str, Form]) -> None:
    """Have the modules of these names compute these forms, untried; those that were switched already stay."""
    for name, form in forms.items():
        module = model.get_submodule(name)
        if FORM not in vars(module):
            _Found(module, form).switch()


def _tried(chosen: list[_Found], run: Callable[[], Tensor], before: Tensor, dtype: torch.dtype) -> str | None:
    """Switch these; why they cannot be used, and are not, or None."""
    for each in chosen:
        each.form.taken = 0
        each.switch()
    try:
        after = run().detach()
        if (after - before).norm() <= FAR.get(dtype, 0.0) * before.norm():
            return None
        why = "gives other states"
    except (TypeError, ValueError, RuntimeError, LookupError, AssertionError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = f"failed with {type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
    _restore(chosen)
    return why


def _restore(chosen: list[_Found]) -> None:
    for each in chosen:
        each.module.__dict__.pop(FORM, None)
        # Somebody else may have put a class above ours since: without its form, ours computes as its own does.
        if vars(type(each.module)).get(PLAIN) is not None:
            each.module.__class__ = vars(type(each.module))[PLAIN]


def _find(model: nn.Module, dtype: torch.dtype) -> Iterator[_Found]:
    """What is recognised. Modules that agree in all but their weights are shown once to be gated products."""
    gates: dict[Any, GateForm | None] = {}
    rotations: dict[Any, Rotation | None] = {}
    for module in model.modules():
        if FORM in vars(module) or "forward" in vars(module):
            continue
        norm = find_norm(module)
        if norm is not None:
            yield _Found(module, norm)
            continue
        key = _likeness(module)
        gate = gates[key] = gates[key] if key in gates else find_gate(module)
        if gate is not None:
            yield _Found(module, gate)
            continue
        own = _rotation_of(type(module))
        if own is not None:
            rotation = rotations[own] = rotations[own] if own in rotations else find_rotation(own, dtype)
            if rotation is not None:
                yield _Found(module, rotation)


def _likeness(module: nn.Module) -> Any:
    """Equal for modules of one class whose settings and whose children's classes and settings are equal."""
    plain = (bool, int, float, str, type(None), FunctionType)
    settings = tuple((name, value) for name, value in vars(module).items() if isinstance(value, plain))
    shapes = tuple((name, tuple(part.shape)) for name, part in module.named_parameters(recurse=False))
    return type(module), settings, shapes, tuple((name, _likeness(child)) for name, child in module.named_children())


def _rotation_of(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """What a class's forward calls by the name of the rotation; None where it calls none, or is wrapped."""
    forward = cls.forward
    if (
        isinstance(forward, FunctionType)
        and not hasattr(forward, "__wrapped__")
        and ROTARY in forward.__code__.co_names
    ):
        own = forward.__globals__.get(ROTARY)
        return own if callable(own) else None
    return None


@functools.lru_cache(maxsize=256)
def _switched(cls: Any, rotation: Rotation | None) -> type[nn.Module]:
    """A subclass that computes the instance's form; of attention, one whose forward finds another rotation.

    The forward of attention is the same code with globals of its own, in which that name means the rotation; all other
    names mean what they mean in the model's module at the time of the call.
    """
    own: Any = cls.forward
    if rotation is None:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) + len(kwargs) == 1 and not torch.compiler.is_compiling():
                (x,) = (*args, *kwargs.values())
                form = self.__dict__.get(FORM)
                made = form(self, x) if form is not None and isinstance(x, Tensor) else None
                if made is not None:
                    return made
            return own(self, *args, **kwargs)
    else:
        names = dict(own.__globals__)
        recognised = names[ROTARY]
        turned = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        turned.__kwdefaults__ = own.__kwdefaults__
        names[ROTARY] = rotation

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                # A user may have patched the model's module since, its rotation too: then theirs is taken.
                names.update(own.__globals__)
                if names[ROTARY] is recognised and FORM in self.__dict__:
                    names[ROTARY] = rotation
            return turned(self, *args, **kwargs)

    # The signature stays the class's own: a bank asks it for the name of the input.
    forward = functools.wraps(own)(forward)
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, PLAIN: cls}
    return type(cls.__name__, (cls,), {**named, "forward": forward, "__copy__": _twin, "__reduce_ex__": _reduced})


def _twin(module: Any) -> Any:
    """A shallow copy, which computes as the module does: a bank makes one where a copy of its parameters is trained."""
    twin = _plain(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def _reduced(module: Any, protocol: Any) -> Any:
    """What is pickled or copied with its parameters is of its own class again: only that has a name to be found by."""
    return _plain, (getattr(type(module), PLAIN),), {key: value for key, value in vars(module).items() if key != FORM}


def _plain(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)
