"""A base made of any transformers model: its processor, what its forward takes, its row rules and its fast parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from manylora.base.fast.attention import is_attended, take_attention, use_attention
from manylora.base.fast.elementwise import forms_of, take_forms, use_elementwise
from manylora.base.findings import Findings, Run
from manylora.base.frozen import FrozenModel, ModuleOutputs
from manylora.base.probes import RowRules
from manylora.base.sites import reads_along
from manylora.errors import BaseMismatch, RouteError
from manylora.types import Batch, Packing


class TransformersBase(FrozenModel):
    """A transformers model with what prepares its inputs.

    Making one runs nothing and reads no weight. `probe` runs short forwards and returns what they found; `take` uses
    findings, those of this model or of another of its architecture. A base serves once it has taken some.

    `processor` prepares inputs of any kind; `tokenizer` is the one that is given, or that of the processor, or None.
    `notes`: what was chosen and why, for the log. `lacks`: what the checkpoint lacks, as `FrozenModel` has it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        processor: Any = None,
        tokenizer: Any = None,
        name: str = "",
        folder: Path | None = None,
        head: nn.Module | None = None,
        example: Callable[[int], Mapping[str, Tensor]] | None = None,
        fingerprint: str | None = None,
        notes: Sequence[str] = (),
        lacks: Mapping[str, Mapping[str, int | None]] | None = None,
    ):
        super().__init__(
            model,
            name=name,
            tokenizer=getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer,
            head=head,
            example=example,
            fingerprint=fingerprint,
            lacks=lacks,
        )
        self.processor = processor
        self.folder = folder
        self.config: Any = getattr(model, "config", None)
        self.findings: Findings | None = None
        self.notes = list(notes)
        self._takes = arguments(model)

    @property
    def found(self) -> Findings:
        """What the probes found.

        Raises:
            RouteError: the base has taken no findings yet.
        """
        if self.findings is None:
            raise RouteError(
                f"{self.name or 'this base'} is used before anything is known of how its model takes rows",
                next_step="base.probed(), or base.take(findings) with those of a base of the same architecture",
            )
        return self.findings

    @property
    def rules(self) -> RowRules:
        """How the model takes its rows."""
        return self.found.rules

    @property
    def packing(self) -> Packing:
        """What keeps the sequences of a packed row apart; "none": rows of one sequence, padded."""
        return self.rules.packing

    @property
    def packs(self) -> bool:
        """Whether a row may hold several sequences."""
        return self.rules.packing != "none"

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return self.rules.causal

    def probed(self) -> Self:
        """This base, ready for use: with its own findings where it has taken none yet."""
        if self.findings is None:
            self.take(self.probe())
        return self

    def probe(self) -> Findings:
        """What short forwards find of the model; the fast parts that pass are left standing in it."""
        if self.example is None:
            note = "nothing is known of how the model computes: there are no example inputs to try"
            return Findings(notes=(note,))
        example = self.example

        def run() -> Tensor:
            made = self.model(**self.given(RowRules(), example(2)))
            return first_states(made).double()

        return self._with_fast_parts(Findings(), run)

    def take(self, findings: Findings) -> None:
        """Use the model as it was found to work; no forward is run, no weight is read.

        Raises:
            BaseMismatch: the findings are of another architecture.
        """
        unknown = [name for name in findings.reads_along if name not in self.sites]
        unknown += [name for name in findings.elementwise if not has_module(self.model, name)]
        if unknown:
            raise BaseMismatch(
                f"the findings name {unknown[0]!r}, which this {type(self.model).__name__} has not",
                allowed="findings of a model of the same architecture",
                next_step="base.take(base.probe())",
            )
        if findings.attention and not is_attended(self.model):
            take_attention(self.model)
        take_forms(self.model, findings.elementwise)
        self.findings = findings
        self.reads_along = findings.reads_along
        self.notes += [note for note in findings.notes if note not in self.notes]

    def outputs(self, batch: Batch) -> Any:
        """The model's own outputs of a batch, floating inputs in the dtype of its weights."""
        return ModuleOutputs(first_states(self.model(**self.given(self.rules, batch.inputs))))

    def given(self, rules: RowRules, inputs: Mapping[str, Any], takes: frozenset[str] | None = None) -> dict[str, Any]:
        """Keyword arguments of the model's forward; what it can do without and does not take is left out.

        That is the cache, positions (the probes have shown that its own are the same), and, where no token sees a later
        one, the mask of the padding at a row's end. `takes`: the names that another module's forward takes, in place of
        the model's.
        """
        found = rules.given(inputs, self.dtype)
        takes = self._takes if takes is None else takes
        spare = {"use_cache", "position_ids"} | ({"attention_mask"} if rules.causal else set())
        return {
            name: value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in found.items()
            if ANY in takes or name in takes or name not in spare
        }

    def _with_fast_parts(self, found: Findings, run: Run) -> Findings:
        """The findings, with the fast parts that give the same states on `run` and the sites that read one input."""
        notes = [*found.notes]
        if self.device.type == "cpu":
            notes.append(use_attention(self.model, run))
            notes.append(use_elementwise(self.model, run))
        # The head is not among them: it is called on other states than those that it is given here.
        sites = {name: site for name, site in self.sites.items() if not site.is_head}
        return replace(
            found,
            attention=is_attended(self.model),
            elementwise=forms_of(self.model),
            reads_along=reads_along(sites, run),
            notes=tuple(notes),
        )


ANY = "**"
"""Stands among the names that a forward takes where it takes any."""


def arguments(module: nn.Module) -> frozenset[str]:
    """Names of the keyword arguments that a forward takes; `ANY` among them where it takes any."""
    found = inspect.signature(module.forward).parameters.values()
    return frozenset(ANY if one.kind is inspect.Parameter.VAR_KEYWORD else one.name for one in found)


def first_states(made: Any) -> Tensor:
    """The logits of what a model gave, or else its first output."""
    logits = getattr(made, "logits", None)
    return made if isinstance(made, Tensor) else made[0] if logits is None else logits


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a model has a module of that dotted name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
