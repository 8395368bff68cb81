"""The shared vocabulary of the code: sites, factors, batches, and the protocols that tables fill.

Nothing here imports another part of manylora but `spec`, `errors`, `forwards` and `gathering`, so every layer of the
house may import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from manylora.errors import RouteError
from manylora.forwards import brought_forward, own_forward
from manylora.gathering import gathered, gathered_again, is_gathered

if TYPE_CHECKING:
    from manylora.spec import AdapterSpec

IGNORED = -100
"""The label of a position where nothing is learned."""

Packing = Literal["positions", "mask", "none"]
"""What keeps the sequences of a packed row apart: positions that restart, a mask of tokens x tokens, or nothing can: a
row holds one sequence."""


class SiteKind(Protocol):
    """What a site is as a map, and how its weight and its low-rank factors lie.

    A weight of any layout is a matrix (out, in) to whoever reads, packs or changes it: `as_map`; what comes of it goes
    back by `as_own`.
    """

    name: str
    """As it stands in receipts."""
    maps: bool
    """Whether it has a matrix (out, in), and so low-rank factors; a whole copy can adapt any other."""
    product: bool
    """Whether its output is items (..., in) times the matrix, plus a bias: part of `all-linear`, and may be packed."""
    transposed: bool
    """Whether the weight lies as (in, out)."""
    drops_input: bool
    """Whether dropout applies to the input of its low-rank branch."""
    zero_factor: str
    """The factor that is zero at a plain start: b, or a where a table's rows are looked up in it."""
    stored: Mapping[str, str]
    """The ends of the keys under which PEFT stores its factors."""
    stored_dims: int
    """How many dimensions a factor has there, which tells kinds of the same keys apart."""

    def recognises(self, module: nn.Module) -> bool | None:
        """None: the module is not of this kind; else whether its class is the textbook one, whose backward is known."""
        ...

    def as_map(self, weight: Tensor) -> Tensor:
        """A weight in the module's own layout as (out, in); a view where it can be."""
        ...

    def as_own(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `as_map`, for a weight of `shape`."""
        ...

    def out_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the map of a weight of `shape`."""
        ...

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> Mapping[str, tuple[int, ...]]:
        """The shapes of a and b for a weight of `shape`; flattened to two dimensions they are (R, in) and (out, R)."""
        ...

    def items(self, x: Tensor) -> Tensor:
        """The site's input, items first: the unit that `Segment` counts in."""
        ...

    def num_items(self, x: Tensor) -> int:
        """How many items the input holds."""
        ...

    def low_rank(self, items: Tensor, a: Tensor, b: Tensor, scale: float, module: nn.Module) -> Tensor:
        """s B A of some items, in plain autograd, items first."""
        ...


PACKED_NAMES = "packed_names"
"""The attribute of a module with a packed weight that names the parameters which hold it."""


def dense_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module itself owns, by name, but for those that hold a packed weight."""
    own = dict(module.named_parameters(recurse=False))
    held = getattr(module, PACKED_NAMES, None)
    return own if not held else {name: parameter for name, parameter in own.items() if name not in held}


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's first floating parameter; None where it has none. What a weight is packed in is none."""
    found = (parameter for module in model.modules() for parameter in dense_parameters(module).values())
    return next((parameter.dtype for parameter in found if parameter.is_floating_point()), None)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Site:
    """A map inside the base that may be adapted.

    `kind` says what map it is (`base.kinds`). `textbook` says that the module's class is the textbook one. `tied_to`
    names the site that owns the same weight and comes first.
    """

    name: str
    kind: SiteKind
    module: nn.Module
    textbook: bool
    is_head: bool = False
    tied_to: str | None = None
    lacks: Mapping[str, int | None] | None = None
    """A head that the checkpoint lacks, so that each adapter brings its own: by parameter the dimension that is as
    large as the adapter's number of outputs, None where none is. None: the base has this site's weights."""

    @property
    def plain(self) -> bool:
        """Whether the map is the textbook one, so that its backward is known: by its class, and nothing was put on it.

        All else is differentiated by autograd.
        """
        return self.textbook and brought_forward(self.module) is None

    @property
    def packed(self) -> Packed | None:
        """The weight in its storage format; None where the module holds it dense."""
        return getattr(self.module, "packed_weight", None)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The frozen weight as (out, in): (O, I) of a linear map, (D, V) of an embedding. A view where it can be.

        A packed weight is unpacked at each call and nothing is kept. `dtype` None: the base's own. It is read within
        `gathered(site.module)`, and a view of it holds for no longer.

        Raises:
            RouteError: somebody has taken the weight out of memory.
        """
        if self.packed is not None:
            module: Any = self.module
            return self.packed.dense(dtype or module.compute_dtype)
        weight = self.module.get_parameter("weight").detach()
        if weight.is_meta:
            raise RouteError(
                f"the weight of {self.name!r} is not in memory while it is needed",
                allowed="weights that stay, or that a forward of the module's own brings (accelerate's hooks)",
                next_step="load the base without offloading, or in fewer bits (quantize: nf4)",
            )
        return self.kind.as_map(weight if dtype is None else weight.to(dtype))

    @property
    def out_in(self) -> tuple[int, int]:
        """Rows and columns of the map, (out, in): (O, I) of a linear one, (D, V) of an embedding."""
        if self.packed is not None:
            return self.packed.shape
        return self.kind.out_in(tuple(self.module.get_parameter("weight").shape))

    def shapes(self, outputs: int | None = None) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that the module owns, in its own layout; a packed weight counts as one.

        `outputs`: of a head that the base lacks, for an adapter of so many outputs.
        """
        own = {name: tuple(parameter.shape) for name, parameter in dense_parameters(self.module).items()}
        for name, dimension in (self.lacks or {}).items():
            if dimension is not None and outputs is not None:
                own[name] = (*own[name][:dimension], outputs, *own[name][dimension + 1 :])
        if self.packed is None:
            return own
        rows, columns = self.packed.shape
        return {"weight": (columns, rows) if self.kind.transposed else (rows, columns)} | own

    def own_layout(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as the module's weight lies."""
        return self.kind.as_own(matrix, self.shapes()["weight"])

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the module owns, in its own layout; a packed weight is unpacked.

        Views of them, or copies where they do not stay.
        """
        with gathered(self.module):
            own = {name: parameter.detach() for name, parameter in dense_parameters(self.module).items()}
            if is_gathered(self.module):
                own = {name: parameter.clone() for name, parameter in own.items()}
            if self.packed is None:
                return own
            return {"weight": self.own_layout(self.weight())} | own

    def map(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's own output, by the module's own code and whatever it brought."""
        if not is_gathered(self.module):
            return own_forward(self.module, *args, **kwargs)
        with gathered_again(self.module):
            return own_forward(self.module, *args, **kwargs)

    def num_parameters(self) -> int:
        """How many numbers the module owns, however they are stored."""
        return sum(math.prod(shape) for shape in self.shapes().values())


@dataclass(frozen=True, slots=True)
class Factors:
    """One method's small tensors at one site: for `lora` a (R, I) and b (O, R), for `full` a copy per parameter.

    `anchors`, by some of the same names, are frozen copies of where an init started them; what they amount to is taken
    off again, so that factors that start away from zero still start at the base. {}: the factors stand alone.
    """

    method: str
    tensors: Mapping[str, Tensor]
    anchors: Mapping[str, Tensor] = field(default_factory=dict)

    def num_parameters(self) -> int:
        """Trained numbers; anchors are none."""
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(slots=True, weakref_slot=True, eq=False)
class Stack:
    """The factors of several slots at one site, by one method and of one shape class.

    `tensors[name]` is (P, ...): one place per slot that adapts this site, zero-padded to the class's rank. The tensors
    are float32 leaves that require gradients. `anchors`, of some of their names and the same shapes, do not; they are
    there for all places or for none, so that slots without anchors pay nothing. `rounding` names the grid of
    `ops.rounding` on which low-rank factors are used, None: as they are. `states` are an optimiser's, under names of
    its own; they come and go with the places. `slots[p]` is the slot that owns place p (-1: free), `ranks[p]`,
    `scales[p]` and `dropouts[p]` are its rank, its factor s and its dropout probability.
    """

    site: Site
    method: str
    shape_class: int
    rounding: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of items (tokens, or whole rows of a `module` site) that one place of a stack changes.

    `parts` splits the run by batch row: (start, stop, stream), offsets into the site's flattened input; the stream
    seeds the row's dropout, None where dropout is off.
    """

    place: int
    start: int
    stop: int
    parts: tuple[tuple[int, int, int | None], ...]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Runs:
    """The segments of a batch that belong to the same slots, in order; `covers_all`: every item is in one.

    All stacks of those slots share one object, so that what is derived from it is derived once for a batch.
    """

    segments: tuple[Segment, ...]
    covers_all: bool


@dataclass(frozen=True, slots=True)
class Use:
    """A stack and the runs of the present batch that it changes."""

    stack: Stack
    runs: Runs


@dataclass(frozen=True, slots=True)
class Start:
    """The place where factors start: a site, the rank there, and the factor s by which the method scales them.

    Every random draw comes from `generator`, a generator of the CPU. `original` gives the site's weight (out, in) as it
    was before it was packed, read from disk at each call; of a site that is not packed it is the weight itself.
    `inputs` is what the init found of the site's inputs; None where it reads no data.
    """

    site: Site
    rank: int
    scale: float
    generator: torch.Generator
    original: Callable[[], Tensor]
    inputs: Any = None


class Method(Protocol):
    """How a few small tensors change one frozen map. Never touches the base: others share it."""

    name: str
    replaces: bool
    """Whether its output replaces the base's, so that the base product may be left out."""
    factored: bool
    """Whether it has factors a and b, and so a rank and a scale."""
    low_rank: bool
    """Whether its change of a weight is s B A of its factors and nothing else: what may be added up, cut, and stored in
    few bits."""
    raised: frozenset[str]
    """Names of the tensors whose learning rate `train.rate_ratio` multiplies."""
    optional: frozenset[str]
    """Names of tensors that a site may be without: its module has nothing for them to stand on."""
    peft: Mapping[str, Any] | None
    """The settings that mark its folders among PEFT's adapters of low rank; None: PEFT keeps it as a copied module."""

    def adapts(self, kind: SiteKind) -> bool:
        """Whether it can stand on a site of this kind."""
        ...

    def num_items(self, site: Site, x: Tensor) -> int:
        """How many items the site's input holds, in the unit that `Segment` counts in."""
        ...

    def rank(self, factors: Factors) -> int:
        """The rank of one site's factors; 0 for a method that has none, whose factors are not scaled."""
        ...

    def shape_class(self, site: Site, factors: Factors) -> int:
        """Factors of one class may share a stack; for a low-rank method the padded rank."""
        ...

    def stack_shapes(self, site: Site, shape_class: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor of one place of a stack."""
        ...

    def init(self, start: Start, spec: AdapterSpec) -> Factors:
        """Fresh factors for a place."""
        ...

    def product(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Its a and b as matrices (R, in) and (out, R), of a method that is `factored`."""
        ...

    def of_product(self, a: Tensor, b: Tensor, like: Factors) -> Factors:
        """Factors with these matrices (R, in) and (out, R), of any rank, and all else as in `like`."""
        ...

    def plain(self, factors: Factors, spec: AdapterSpec) -> Factors:
        """The same map without anchors, and on the grid where factors are used there, so that other tools compute it.

        Its rank may be another one.
        """
        ...

    def stored(self, kind: SiteKind) -> Mapping[str, str]:
        """By tensor, the end of the key under which a folder of PEFT's holds it, for a site of this kind."""
        ...

    def delta(self, site: Site, factors: Factors, spec: AdapterSpec) -> Mapping[str, Tensor]:
        """The dense change of each parameter of the site's module, in its own layout, float32 or better."""
        ...

    def forward(
        self, x: Tensor, y: Tensor | None, site: Site, uses: Sequence[Use], extra: tuple[tuple, dict]
    ) -> Tensor:
        """The site's output for the whole batch.

        `y` is the output so far; None asks the method to compute the base's own part too. `uses` are all stacks of this
        method that the batch reaches; `extra` are further arguments of the site's forward, passed on.
        """
        ...

    def together(self, x: Tensor, sites: Sequence[tuple[Site, Sequence[Use]]]) -> Sequence[Tensor] | None:
        """The outputs of sites that read one input, with the base's own part; None: `forward` does each by itself."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that are computed together; row r belongs to slot `slots[r]`.

    `inputs` are keyword arguments of the base's forward, rows first. `targets` are what the objective compares with,
    rows first: `labels` (rows, tokens) int64 is the token that each position must predict (already shifted), IGNORED
    where nothing is learned; `sequences` (rows, tokens) int64 says which sequence of its row each position belongs to.
    `streams` seeds each row's dropout; None: dropout off.

    `costs[r]` is what row r takes to compute, in tokens, padding counted; `num_trained[r]` is how many targets it
    holds. Both are those of whoever made the batch: nobody else knows which of the targets is one.
    """

    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    slots: tuple[int, ...]
    streams: tuple[int, ...] | None = None
    costs: tuple[int, ...] = ()
    num_trained: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, targets={name: tensor.to(device) for name, tensor in self.targets.items()})

    def rows_of(self, slots: Collection[int]) -> tuple[int, ...]:
        """The rows that belong to one of these slots, in order."""
        return tuple(row for row, slot in enumerate(self.slots) if slot in slots)

    def only(self, slots: Collection[int]) -> Batch:
        """The rows of these slots, in order; the batch itself where that is all of them."""
        return self.take(self.rows_of(slots))

    def take(self, rows: Sequence[int]) -> Batch:
        """These rows, in this order; the batch itself where that is all of them in their own order."""
        if tuple(rows) == tuple(range(self.num_rows)):
            return self

        def of(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(values[row] for row in rows) if values else ()

        return Batch(
            inputs={name: take_rows(tensor, rows) for name, tensor in self.inputs.items()},
            targets={name: take_rows(tensor, rows) for name, tensor in self.targets.items()},
            slots=of(self.slots),
            streams=None if self.streams is None else of(self.streams),
            costs=of(self.costs),
            num_trained=of(self.num_trained),
        )


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor (rows, ...), in this order; a view where they are neighbours."""
    first = rows[0] if rows else 0
    if tuple(rows) == tuple(range(first, first + len(rows))):
        return tensor[first : first + len(rows)]
    return tensor[torch.tensor(rows, device=tensor.device)]


@dataclass(frozen=True, slots=True)
class RowTotals:
    """What an objective returns: `total` (rows,) sums of the loss in float32 or better, `metrics` (rows,) sums by name.

    Divide sums by `Objective.weight` of the same rows, added over as many rows as belong together. `observed`
    (rows, ...), without a gradient, is what each row adds to what the objective learns of its member in this step.
    """

    total: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)


class Outputs(Protocol):
    """The base's outputs, before anything of the size tokens x vocabulary exists."""

    def map_supervised(
        self,
        labels: Tensor,
        fn: Callable[..., Mapping[str, Tensor]],
        *,
        beside: Any = None,
        sequences: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Sums by row of `fn(logits (n, V), labels (n,)) -> {name: (n,)}` over the supervised positions.

        A position is supervised where its label is not IGNORED. `beside` are outputs of the same rows that no gradient
        flows to, a reference's: `fn` is then given their logits (n, V) of the same positions as its third argument.
        With `sequences` (rows, tokens), of each position the number of its sequence, the sums are (rows, sequences).
        """
        ...

    def whole_rows(self) -> Tensor:
        """Every place of every row, in float32 or better: logits (rows, tokens, V), or what the module itself gives."""
        ...

    def take(self, rows: Sequence[int]) -> Outputs:
        """The outputs of these rows of the batch, in this order."""
        ...


@dataclass(frozen=True, slots=True)
class Follower:
    """An adapter beside a member's own that no gradient trains: a copy of what the member starts from, or another.

    After each step it keeps the share `decay` of what it was and takes the rest from the member: 1 stays the start, a
    little less is a slow average. `adapter` is the folder of another adapter of the same base, which stays as it is.
    """

    decay: float = 1.0
    adapter: str | None = None


class Beside(Protocol):
    """What an objective may ask for beside the outputs of its rows."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What `Objective.update` made of the steps before; the same for all rows of a step."""
        ...

    def outputs(self, batch: Batch, who: str = "base") -> Outputs:
        """The outputs of rows: of the bare base ("base") or a follower by its name, without gradient and dropout.

        "own" are the rows' own slots, with both: for a second batch, another view of the same examples.

        Raises:
            RouteError: the objective has no follower of that name.
        """
        ...


class Objective(Protocol):
    """What is minimised: a function of (outputs, batch), and of what it asks for beside them.

    It holds nothing itself. What it learns of a member is the member's: `begin` before the first step, then `update`.
    """

    supervises: frozenset[str]
    """Where its labels stand: at `positions` of a row, at whole `rows`."""

    @property
    def followers(self) -> Mapping[str, Follower]:
        """The adapters that it wants kept beside each member's own, by name."""
        ...

    def told(self, settings: Any) -> Objective:
        """The same objective with settings of its own; those of equal settings are equal."""
        ...

    def summary(self, loss: float, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """What follows from the mean loss and the metrics of an evaluation, by name: a perplexity."""
        ...

    def begin(self) -> Mapping[str, Tensor]:
        """The state of a member that has made no step; {}: this objective keeps none."""
        ...

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state after a step: `observed` are the rows' `RowTotals.observed`, added over all rows of the step."""
        ...

    def weight(self, batch: Batch) -> Tensor:
        """(rows,) float64: how much each row counts, from the data alone, so that accumulation is exact."""
        ...

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals: ...


class Packed(Protocol):
    """A frozen (O, I) weight in one storage format: made by an explicit act, never a side effect of `.to()`."""

    @property
    def format(self) -> str:
        """The name of the format in `manylora.quant.PACKINGS`."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, (O, I); new each time, nothing is kept."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk, by short name: codes, scales."""
        ...

    def settings(self) -> dict[str, Any]:
        """The rest of what is written to disk, as JSON: format, shape, block and so on."""
        ...

    def nbytes(self) -> int:
        """Bytes held in memory."""
        ...

    def bits(self) -> float:
        """Bits per weight, scales counted."""
        ...

    def to(self, device: torch.device | str) -> Packed:
        """The same codes on a device."""
        ...


class PackFormat(Protocol):
    """How a frozen weight is stored in few bits."""

    name: str

    def pack(self, weight: Tensor, **options: Any) -> Packed:
        """Round a (O, I) floating-point weight to this format; the weight is left as it is."""
        ...

    def from_tensors(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Packed:
        """What `tensors()` and `settings()` of a packed weight gave, read again."""
        ...
