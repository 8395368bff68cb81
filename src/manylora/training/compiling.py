"""The layers of a base compiled by torch: what stands between products and attention is done in few passes over memory.

The adapted sites and the attention stay the code that they are: a compiled layer calls them. So adapters come and go,
routes change and dropout is drawn as before, and nothing of that is compiled again. Only forwards that are trained
through are compiled: an evaluation runs as it did, and costs no second compilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from manylora.adapters.bank import Bank
from manylora.base.fast.attention import opaque_attention
from manylora.base.frozen import FrozenModel
from manylora.base.layers import Layer, repeated_layers
from manylora.errors import ConfigError
from manylora.forwards import Level, StandIn, brought_forward, place_stand_in
from manylora.gathering import is_gathered
from manylora.memory.allocator import freed_memory_kept
from manylora.training.checkpointing import Mode, checkpointed
from manylora.training.step import ForwardTooLarge, micro_batches, probe_step
from manylora.types import Site

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.training.member import Member

LEAST_STEPS, LEAST_SECONDS = 500, 3600
"""Of a run in which `auto` tries. A try takes ten to sixty seconds, and a few batches."""
LEAST_GAIN = 0.03
"""Of a batch's time, what compiled layers must save to be kept: less is within the noise of so short a try."""
VARIANTS = 64
"""Forms of one layer's code that are compiled before torch gives up and runs it as it is: few rows or many, with a
gradient for the input or without, layers of several kinds. torch's own 8 are too few for a base of several kinds."""


class Compiling:
    """The layers of a base, compiled while `compiled` is open."""

    def __init__(self, base: FrozenModel):
        self.layers = repeated_layers(base.model, base.sites)
        self._before = _seconds_compiling()

    @property
    def seconds(self) -> float:
        """What compiling has taken since this object was made."""
        return _seconds_compiling() - self._before


@contextmanager
def compiled(base: FrozenModel, on: bool = True) -> Iterator[Compiling | None]:
    """While it is open, the layers of a base that carries a bank run as torch's compiler makes them; None if not `on`.

    Raises:
        ConfigError: the base has no repeated layers.
    """
    if not on:
        yield None
        return
    import torch._dynamo as dynamo
    from torch.fx.experimental import _config as shapes

    found = Compiling(base)
    check_compiles(base, found.layers)
    with ExitStack() as stack:
        stack.enter_context(dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=16 * VARIANTS))
        patched = shapes.patch(use_duck_shape=False)  # pyright: ignore[reportAttributeAccessIssue] - made at import
        stack.enter_context(patched)  # as many rows as heads is chance
        stack.enter_context(opaque_attention())
        for layer in found.layers:
            stack.enter_context(_CompiledForward(base, layer))
        yield found


def check_compiles(base: FrozenModel, layers: list[Layer] | None = None) -> None:
    """Refuse a base that cannot be compiled by layers.

    Raises:
        ConfigError: it has no repeated layers.
    """
    if len(repeated_layers(base.model, base.sites) if layers is None else layers) < 2:
        raise ConfigError(
            "train.compile is layers, and this base has no repeated layers to compile", allowed="off, or auto"
        )


def choose_compiling(
    base: FrozenModel, member: Member, adapter: Adapter, asked: str, mode: Mode, budget_tokens: int | None = None
) -> tuple[bool, str]:
    """Whether the layers of a run of one member are compiled, and one line that says why; the base carries no bank.

    `asked` is `train.compile`. `layers` compiles them now, on the largest batch, so that what it costs is known before
    the first step. `auto` tries the same where a run is long enough to pay for the try, and keeps what is faster.

    Raises:
        ConfigError: `layers`, and the base has none, or torch's compiler fails on them.
    """
    if asked == "off":
        return False, "compile: off, train.compile"
    steps = member.recipe.last_step
    if asked == "auto":
        if len(repeated_layers(base.model, base.sites)) < 2:
            return False, "compile: off, this base has no repeated layers"
        if not getattr(base.model, "_can_compile_fullgraph", False):
            return False, "compile: off, this base is not known to compile"
        if mode == "selective":
            return False, "compile: off, checkpointing is selective and watches the layers' products"
        if steps < LEAST_STEPS:
            return False, f"compile: off, {steps:,} steps are too few to pay for a try"
    else:
        check_compiles(base)
    slot, member.slot = member.slot, 0
    try:
        with Bank(base) as bank, freed_memory_kept():
            bank.put(adapter, slot=0)
            batches = steps * len(micro_batches([member], base, budget_tokens))
            return _tried(base, asked, batches, lambda: _seconds(base, member, mode, budget_tokens))
    except ForwardTooLarge as error:
        return asked == "layers", f"compile: {'layers' if asked == 'layers' else 'off'}, not tried: {error.what}"
    finally:
        member.slot = slot


def _tried(base: FrozenModel, asked: str, batches: int, run: Callable[[], float]) -> tuple[bool, str]:
    """What `choose_compiling` answers; `run` gives the seconds of the largest batch, of so many that a run has."""
    plain = 0.0
    if asked == "auto":
        plain = min(run() for _ in range(2))
        if plain * batches < LEAST_SECONDS:
            return False, f"compile: off, about {plain * batches / 60:.0f} minutes are too few to pay for a try"
    try:
        with compiled(base):
            first = run()
            if asked == "layers":
                return True, f"compile: layers, train.compile; compiling them and the first batch took {first:.1f} s"
            fast = min(run() for _ in range(2))
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = f"torch's compiler fails on this base's layers: {(str(error) or type(error).__name__).splitlines()[0]}"
        if asked == "layers":
            raise ConfigError(
                why, next_step="set train.compile to off; on a CPU the compiler needs g++ or clang++"
            ) from error
        return False, f"compile: off, {why}"
    on = fast < (1 - LEAST_GAIN) * plain
    told = f"a batch takes {fast / plain:.2f} of its time so, and the try took {first:.0f} s"
    return on, f"compile: {'layers' if on else 'off'}, {told}"


def _seconds(base: FrozenModel, member: Member, mode: Mode, budget_tokens: int | None) -> float:
    """What the largest batch of a member takes, its layers computed by a mode, compiled or not."""
    with checkpointed(base, mode):
        started = time.perf_counter()
        probe_step(base, [member], budget_tokens)
        return time.perf_counter() - started


class _CompiledForward:
    """What stands in for a layer's forward, and for the forwards of its sites; checkpointing comes around it."""

    def __init__(self, base: FrozenModel, layer: Layer):
        self.base = base
        self.module: Any = layer.module
        self.run = _compile(type(self.module).forward)
        self.sites = [base.sites[name] for name in layer.sites]
        self._placed: list[StandIn] = []
        self._by_site: dict[str, tuple[StandIn, Callable[..., Any]]] = {}

    def __enter__(self) -> None:
        # A layer that brought a forward of its own runs that, and is not compiled.
        if brought_forward(self.module) is not None:
            return
        self._placed.append(place_stand_in(self.module, self, Level.LAYER))
        for site in self.sites:
            stand_in = place_stand_in(site.module, None, Level.LAYER)
            self._placed.append(stand_in)
            self._by_site[site.name] = stand_in, _opaque(stand_in)

    def __exit__(self, *exception: object) -> None:
        for stand_in in self._placed:
            stand_in.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            for stand_in, _ in self._by_site.values():
                stand_in.show(stand_in)
            return type(self.module).forward(self.module, *args, **kwargs)
        for site in self.sites:
            stand_in, hidden = self._by_site[site.name]
            stand_in.show(None if self._is_compiled(site) else hidden)
        return self.run(self.module, *args, **kwargs)

    def _is_compiled(self, site: Site) -> bool:
        """Whether a site's own code is compiled with its layer: nobody adapts it, and its weight stays."""
        if site.packed is not None or is_gathered(site.module):
            return False
        return brought_forward(site.module) is None and not self.base.bank.adapts(site)


@cache
def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form of a class's forward. Sizes are left open: rows are as long as what was packed into them."""
    return torch.compile(forward, dynamic=True)


@cache
def _opaque_class() -> type:
    """Callables that the compiler does not look into; made late, for torch's compiler takes a second to import."""

    class Opaque:
        def __init__(self, run: Callable[..., Any]):
            self.run = run

        @torch.compiler.disable
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

    return Opaque


def _opaque(run: Callable[..., Any]) -> Callable[..., Any]:
    return _opaque_class()(run)


def _seconds_compiling() -> float:
    """What torch's compiler has taken in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
