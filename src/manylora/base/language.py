"""A base with a vocabulary: hidden states, and the head in chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manylora.base.findings import Findings
from manylora.base.frozen import summed_by_row
from manylora.base.probes import REFUSALS, RowRules, packed_inputs, probe_rows
from manylora.base.tokenizer import template_digest, tokenizer_digest
from manylora.base.transformers_base import TransformersBase, arguments, first_states
from manylora.errors import BaseBroken, BaseMismatch
from manylora.forwards import Level, standing_in
from manylora.gathering import gathered
from manylora.ops.dropout import mix
from manylora.ops.positions import LINEAR_DTYPES, linear_nats, nats, values_and_gradient, with_gradient
from manylora.types import IGNORED, Batch, Site, take_rows

CHUNK_ELEMENTS = 1 << 22
"""Logits that exist at one time while a loss is computed in chunks: positions x vocabulary."""

PostHead = Callable[[Tensor], Tensor]


def post_head_maps(config: Any) -> dict[str, PostHead]:
    """What a model may do to its logits after the head, read from its configuration, the identity first."""
    maps: dict[str, PostHead] = {"none": lambda logits: logits}
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        maps["softcap"] = lambda logits: torch.tanh(logits / cap) * cap
    for key in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, key, None)
        if factor:
            maps[key] = lambda logits, factor=factor: logits * factor
    divisor = getattr(config, "logits_scaling", None)
    if divisor:
        maps["logits_scaling"] = lambda logits: logits / divisor
    return maps


class LanguageBase(TransformersBase):
    """A transformers model that predicts tokens, with its tokenizer and, once it was probed, what the probes found.

    `packing`: what keeps the sequences of a packed row apart ("positions" that restart, a "mask" of tokens x tokens),
    "none" where a row holds one sequence. `causal`: no token sees a later one. `post_head`: the name of the map after
    the head, None where the model's own logits are taken. `notes`: what was chosen and why, for the log.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        name: str = "",
        folder: Path | None = None,
        fingerprint: str | None = None,
        notes: Sequence[str] = (),
    ):
        super().__init__(
            model,
            processor=tokenizer,
            tokenizer=tokenizer,
            name=name,
            folder=folder,
            head=getattr(model, "get_output_embeddings", lambda: None)(),
            example=self._example,
            fingerprint=fingerprint,
            notes=notes,
        )
        text_config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        self.text_config: Any = text_config
        self.vocabulary: int = text_config.vocab_size
        self.max_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.backbone: Any = getattr(model, "base_model", model)
        self.eos_ids = stop_ids(model, tokenizer)
        self.pad_id = _pad_id(tokenizer, self.eos_ids)
        self._backbone_takes = arguments(self.backbone)
        self._padding = getattr(text_config, "pad_token_id", None)
        self._post: PostHead | None = None

    @property
    def post_head(self) -> str | None:
        """The name of the map after the head; None: the model's own logits are taken whole."""
        return self.found.post_head

    @property
    def tokenizer_digest(self) -> str | None:
        """SHA-256 of all that decides which tokens a text becomes; None without a tokenizer."""
        return tokenizer_digest(self.tokenizer)

    @property
    def template_digest(self) -> str | None:
        """SHA-256 of the chat template; None where there is none."""
        return template_digest(self.tokenizer)

    def probe(self) -> Findings:
        """What short forwards find of the model; the fast parts that pass are left standing in it."""
        self._refuse_broken()
        found = self._probe_head()
        rules, why = probe_rows(
            lambda rules, inputs: self.states(replace(found, rules=rules), inputs).double(),
            self._draw,
            self.text_config,
        )
        notes = [why]
        if found.post_head is None:
            notes.append("the model's own logits are taken whole: no known map after its head reproduces them")
        elif not found.enters_model:
            notes.append("hidden states are taken from the backbone: the model gives others, or none, past its head")
        found = replace(found, rules=rules, notes=tuple(notes))
        # A row of two sequences, or of one where rows hold no more.
        packed = packed_inputs(self._draw(1, 16), (7, 9) if rules.packing != "none" else (16,), rules)
        return self._with_fast_parts(found, lambda: self.states(found, packed).double())

    def take(self, findings: Findings) -> None:
        """Use the model as it was found to work; no forward is run, no weight is read.

        Raises:
            BaseMismatch: the findings are of another architecture.
        """
        post = post_head_maps(self.text_config)
        if findings.post_head is not None and findings.post_head not in post:
            raise BaseMismatch(
                f"the findings have {findings.post_head!r} after the head, of which this configuration says nothing",
                allowed=", ".join(post),
                next_step="base.take(base.probe())",
            )
        super().take(findings)
        self._post = None if findings.post_head is None else post[findings.post_head]
        positions = getattr(self.text_config, "max_position_embeddings", None)
        self.max_positions = None if positions is None else positions - (findings.rules.first_position or 0)

    def outputs(self, batch: Batch) -> LanguageOutputs:
        """Hidden states of a batch, from which an objective maps the logits of the positions that it needs."""
        return LanguageOutputs(self, self.states(self.found, batch.inputs), batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) to (..., V) in float32 (float64 stays): the head site, then the model's own map after it."""
        if self._post is None or self.head is None:
            return _widen(hidden)
        return self._post(_widen(self._raw_logits(self.head, hidden)))

    def states(self, found: Findings, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states before the head; the model's own logits where no map after its head is known.

        `inputs` may bring a cache (`past_key_values`, `use_cache`).
        """
        if found.post_head is None:
            logits: Tensor = self.model(**self._given(found.rules, inputs)).logits
            return logits
        if found.enters_model:
            return self._states_of_model(found.rules, inputs)
        return self._states_of_backbone(found.rules, inputs)

    def _raw_logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        # Some models end in float32 whatever the dtype of their weights (Mamba), and narrow that before the head.
        weight = head.get_parameter("weight")
        return head(hidden.to(weight.dtype) if weight.is_floating_point() else hidden)

    def _states_of_model(self, rules: RowRules, inputs: Mapping[str, Any]) -> Tensor:
        """What the backbone gives while the whole model runs, so that all runs that hooks of the model bring.

        Its head is passed by, and gives logits of no token, so that what the model does after it costs nothing.
        """
        seen: list[Any] = []
        watch = self.backbone.register_forward_hook(lambda module, args, made: seen.append(made[0]))
        try:
            with standing_in(self.head, _no_logits, Level.HEAD):  # pyright: ignore[reportArgumentType] - post_head
                self.model(**self._given(rules, inputs))
        finally:
            watch.remove()
        (hidden,) = seen
        return hidden

    def _states_of_backbone(self, rules: RowRules, inputs: Mapping[str, Any]) -> Tensor:
        hidden: Tensor = self.backbone(**self._given(rules, inputs, self._backbone_takes))[0]
        return hidden

    def _given(self, rules: RowRules, inputs: Mapping[str, Any], takes: frozenset[str] | None = None) -> dict[str, Any]:
        return self.given(rules, {"use_cache": False, **inputs}, takes)

    def _example(self, rows: int) -> Mapping[str, Tensor]:
        positions = torch.arange(8, device=self.device).expand(rows, 8)
        given = self._given(self.rules, {"input_ids": self._draw(rows, 8), "position_ids": positions})
        return {name: value for name, value in given.items() if name != "use_cache"}

    def _draw(self, rows: int, length: int) -> Tensor:
        """Random tokens, none of them padding: a model may leave padding out when it counts its positions."""
        generator = torch.Generator().manual_seed(7)
        tokens = torch.randint(0, self.vocabulary, (rows, length), generator=generator)
        if self._padding is not None:
            tokens[tokens == self._padding] = (self._padding + 1) % self.vocabulary
        return tokens.to(self.device)

    @torch.no_grad()
    def _refuse_broken(self) -> None:
        """Numbers that are not finite would make every later finding one about them.

        Raises:
            BaseBroken: names the weight that holds some.
        """
        states = first_states(self.model(**self._given(RowRules(), {"input_ids": self._draw(1, 8)})))
        if bool(torch.isfinite(states).all()):
            return
        for name, weight in self.model.named_parameters():
            if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
                raise BaseBroken(
                    f"{name!r} of {self.name or 'the base'} holds numbers that are not finite",
                    next_step="fetch the base again, or look at what wrote it",
                )

    @torch.no_grad()
    def _probe_head(self) -> Findings:
        """How hidden states are had and what the model does after its head; of rows nothing is known yet."""
        if self.head is None or self.backbone is self.model:
            return Findings()
        rules, inputs = RowRules(), {"input_ids": self._draw(1, 8)}
        own = self.model(**self._given(rules, inputs)).logits.double()
        hidden = self._states_of_backbone(rules, inputs)
        if hidden.shape[-1] != self.head.get_parameter("weight").shape[-1]:
            return Findings()  # something stands between the two that changes the width
        raw = self._raw_logits(self.head, hidden).double()
        for name, post in post_head_maps(self.text_config).items():
            if raw.shape == own.shape and (post(raw) - own).norm() <= 1e-2 * own.norm():
                return Findings(post_head=name, enters_model=self._enters_model(rules, inputs, hidden))
        return Findings()

    def _enters_model(self, rules: RowRules, inputs: Mapping[str, Tensor], hidden: Tensor) -> bool:
        """Whether a call of the whole model passes by the head and gives the backbone's own states."""
        try:
            seen = self._states_of_model(rules, inputs)
        except REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return seen.shape == hidden.shape and bool((seen - hidden).norm() <= 1e-2 * hidden.norm())


def _no_logits(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """(..., H) to (..., 0)."""
    return hidden[..., :0]


class LanguageOutputs:
    """Hidden states (rows, tokens, H) of a batch; logits exist for a chunk of supervised positions at a time."""

    def __init__(self, base: LanguageBase, hidden: Tensor, batch: Batch):
        self.base = base
        self.hidden = hidden
        self.route = None if base.bank is None else base.bank.route_now
        self.num_rows = batch.num_rows

    def map_supervised(
        self,
        labels: Tensor,
        fn: Callable[..., Mapping[str, Tensor]],
        *,
        beside: LanguageOutputs | None = None,
        sequences: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Sums by row of `fn(logits (n, V), labels (n,)) -> {name: (n,)}` over the supervised positions.

        Nothing of the size positions x vocabulary outlives its chunk, of `beside` neither. Behind a head that no
        adapter of this batch changes, a position's gradient is computed along with its value; behind another, and where
        several outputs of `fn` have a gradient, the backward computes a chunk's logits again. `beside` and `sequences`
        are those of `types.Outputs`.
        """
        chosen = labels.ne(IGNORED)
        counts = chosen.sum(dim=1).tolist()
        index = chosen.reshape(-1).nonzero().squeeze(1)
        positions = _Positions(self._states_at(index), labels.reshape(-1).index_select(0, index), None)
        if beside is not None:
            fn = partial(_with_logits_of, beside, fn)
            positions = positions._replace(others=beside._states_at(index))
        values = self._values(positions, counts, fn)
        of_sequence = None if sequences is None else sequences.reshape(-1).index_select(0, index)
        return summed_by_row(values, index // labels.shape[1], self.num_rows, of_sequence)

    def whole_rows(self) -> Tensor:
        """Logits (rows, tokens, V) of every position, in float32 or better: for vocabularies that are small."""
        tokens = self.hidden.shape[1]
        with self._route_of([(row, 0, tokens) for row in range(self.num_rows)])():
            logits = self.base.logits(self.hidden.reshape(-1, self.hidden.shape[-1]))
        return logits.view(self.num_rows, tokens, -1)

    def take(self, rows: Sequence[int]) -> LanguageOutputs:
        """The outputs of these rows, in this order; itself where that is all of them in their own order."""
        if tuple(rows) == tuple(range(self.num_rows)):
            return self
        chosen = copy.copy(self)
        chosen.num_rows = len(rows)
        chosen.hidden = take_rows(self.hidden, rows)
        chosen.route = None if self.route is None else self.route.take(rows)
        return chosen

    def _states_at(self, index: Tensor) -> Tensor:
        return self.hidden.reshape(-1, self.hidden.shape[-1]).index_select(0, index)

    def _values(self, positions: _Positions, counts: list[int], fn: Callable) -> Mapping[str, Tensor]:
        """What `fn` gives for each position, in order."""
        hidden, labels, _ = positions
        if not len(labels):  # no row of the batch supervises anything
            with torch.no_grad():
                return self._run(*positions, [], fn)
        constant = self._head_is_constant(hidden, counts)
        if constant and fn is nats and (head := self._linear_head()) is not None:
            with gathered(head):
                return {"nats": linear_nats(hidden, labels, head.weight, head.bias)}
        grouped = chunks(counts, max(1, CHUNK_ELEMENTS // self.base.vocabulary))
        # A head that is adapted, alone perhaps, wants a gradient where the states do not.
        if torch.is_grad_enabled() and (hidden.requires_grad or not constant):
            known = self._values_and_gradient(positions, grouped, fn) if constant else None
            return self._recomputed(positions, grouped, fn) if known is None else known
        return _joined([self._run(*piece, fn) for piece in _each(positions, grouped)])

    def _head_is_constant(self, hidden: Tensor, counts: list[int]) -> bool:
        """Whether logits are a function of the states alone, and nothing else between the two wants a gradient."""
        head, bank, site = self.base.head, self.base.bank, self._head_site
        if head is None or self.base.post_head is None:
            return True  # the states are the model's own logits
        if any(parameter.requires_grad for parameter in head.parameters()):
            return False
        if bank is None or self.route is None or site is None:
            return bank is None
        with bank.route(type(self.route)(self.route.slots, self.route.streams, tuple(counts))):
            return not bank.uses(site, hidden)

    @property
    def _head_site(self) -> Site | None:
        return next((site for site in self.base.sites.values() if site.is_head), None)

    def _linear_head(self) -> nn.Linear | None:
        """The head where the logits are that linear map and no more, in a dtype that can do without logits."""
        site = self._head_site
        if self.base.post_head != "none" or site is None or not site.plain or not isinstance(site.module, nn.Linear):
            return None
        return site.module if site.module.weight.dtype in LINEAR_DTYPES else None

    def _run(
        self,
        hidden: Tensor,
        labels: Tensor,
        others: Tensor | None,
        pieces: Pieces,
        fn: Callable,
    ) -> dict[str, Tensor]:
        """What `fn` gives for a chunk; `others` are states of the same positions that `fn` is given besides."""
        with self._route_of(pieces)():
            logits = self.base.logits(hidden)
        return dict(fn(logits, labels) if others is None else fn(logits, labels, others, pieces))

    def _recomputed(self, positions: _Positions, grouped: list, fn: Callable) -> Mapping[str, Tensor]:
        """The values; a chunk's route is made here and travels with it into the backward's recomputation."""
        return _joined([
            checkpoint(self._run, *piece, fn, use_reentrant=False, preserve_rng_state=False)
            for piece in _each(positions, grouped)
        ])  # fmt: skip

    def _values_and_gradient(self, positions: _Positions, grouped: list, fn: Callable) -> Mapping[str, Tensor] | None:
        """The values, with the gradient of the one that has one; None where several have one."""
        found: list[dict[str, Tensor]] = []
        gradients = torch.empty_like(positions.hidden)
        trained: str | None = None
        begin = 0
        for part, labels, others, pieces in _each(positions, grouped):
            made = values_and_gradient(partial(self._run, labels=labels, others=others, pieces=pieces, fn=fn), part)
            if made is None:
                return None
            values, trained, gradient = made
            found.append(values)
            if gradient is not None:
                gradients[begin : begin + len(part)] = gradient
            begin += len(part)
        joined = _joined(found)
        if trained is not None:
            joined[trained] = with_gradient(joined[trained], positions.hidden, gradients)
        return joined

    def _route_of(self, pieces: Pieces) -> Callable:
        if self.route is None:
            return nullcontext
        route, bank = self.route, self.base.bank
        streams = None
        if route.streams is not None:
            # A row's second chunk must not repeat the masks of its first, and may not depend on its neighbours.
            streams = tuple(mix(route.streams[row], start) for row, start, _ in pieces)
        chosen = type(route)(
            tuple(route.slots[row] for row, _, _ in pieces), streams, tuple(stop - start for _, start, stop in pieces)
        )
        return lambda: bank.route(chosen)


class _Positions(NamedTuple):
    """States (n, H) and labels (n,) of the supervised positions, and a reference's states of the same positions."""

    hidden: Tensor
    labels: Tensor
    others: Tensor | None


Pieces = list[tuple[int, int, int]]
"""(row, start, stop): which of the supervised positions of a row."""


def _each(positions: _Positions, grouped: list[Pieces]) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Pieces]]:
    """The states and labels of each group of pieces, and the pieces."""
    sizes = [sum(stop - start for _, start, stop in pieces) for pieces in grouped]
    hidden, labels, others = positions
    beside = [None] * len(sizes) if others is None else others.split(sizes)
    yield from zip(hidden.split(sizes), labels.split(sizes), beside, grouped, strict=True)


def _with_logits_of(
    beside: LanguageOutputs, fn: Callable, logits: Tensor, labels: Tensor, states: Tensor, pieces: Pieces
) -> Mapping[str, Tensor]:
    """`fn` with the logits of a reference's states at the same positions, to which no gradient flows."""
    with torch.no_grad(), beside._route_of(pieces)():
        others = beside.base.logits(states)
    return fn(logits, labels, others)


def _joined(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([values[name] for values in found]) for name in found[0]}


def chunks(counts: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Pieces (row, start, stop) of the rows' items, grouped so that a group holds at most `limit` items.

    A row is cut at multiples of `limit` from its own start, so where it is cut does not depend on its neighbours.
    """
    groups: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, count in enumerate(counts):
        for start in range(0, count, limit):
            size = min(limit, count - start)
            if size > room or not groups:
                groups.append([])
                room = limit
            groups[-1].append((row, start, start + size))
            room -= size
    return groups


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a generation: the tokenizer's end of text first, then the model's own list."""
    text_end = getattr(tokenizer, "eos_token_id", None)
    found: list[int] = [] if text_end is None else [text_end]
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if own is None:
        own = getattr(getattr(model, "config", None), "eos_token_id", None)
    found += [] if own is None else [own] if isinstance(own, int) else list(own)
    return tuple(dict.fromkeys(found))


def _pad_id(tokenizer: Any, eos_ids: Sequence[int]) -> int:
    """What fills the places that nothing reads: padding is masked by position, so any token serves."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else eos_ids[0] if eos_ids else 0
