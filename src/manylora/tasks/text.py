"""What tasks share that learn from text and answer in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.errors import ConfigError
from manylora.evaluation.evaluate import evaluate_text
from manylora.tasks.data import held_out_places, object_of, open_places, reading_of, text_data
from manylora.tasks.task import Answer, Scored

if TYPE_CHECKING:
    from manylora.config import Config
    from manylora.data.sources import Source
    from manylora.evaluation.sample import Metrics, Sample
    from manylora.tasks.data import RunData

Sources = tuple[list[tuple["Source", float]], list[tuple["Source", float]]]


class TextTask:
    """A language model learns from rows of text; what it writes to their prompts is scored by `metrics`."""

    name: str
    auto = "AutoModelForCausalLM"
    objective = "causal-lm"
    kinds: tuple[str, ...] = ("sequence",)
    """The kinds of data format that it learns from."""
    causal = True
    """Whether it learns only from a base in which no token sees a later one."""

    def find(self, config: Config, objects: Mapping[str, Any]) -> Sources:
        places = (config.data.train, held_out_places(config))
        train, held_out = (open_places(own, config.data.columns, objects) for own in places)
        return train, held_out

    def open(self, config: Config, objects: Mapping[str, Any]) -> LanguageBase:
        base = self._opened(config, objects)
        if self.causal and not base.causal:
            raise ConfigError(
                f"the task {config.task} learns to predict the next token, and in {base.name} a token sees the next: "
                "it would only learn to copy",
                next_step="choose a base that is a causal language model",
            )
        return base

    def _opened(self, config: Config, objects: Mapping[str, Any]) -> LanguageBase:
        if config.base.startswith("python:"):
            base = object_of(config.base, objects, "base")
            if isinstance(base, LanguageBase):
                return base.probed()
            raise ConfigError(
                f"the task {config.task} learns from text, and the base is a {type(base).__name__} without a tokenizer",
                next_step="set task: module to learn from tensors, or give a base that manylora.load_base made",
            )
        return load_base(
            config.base,
            dtype=config.dtype,
            device=config.device,
            quantize=config.quantize,
            auto=self.auto,
            trust_remote_code=config.trust_remote_code,
            chat_template=config.data.chat_template,
        )

    def row_tokens(self, config: Config, base: Any) -> tuple[int, list[str]]:
        """What is asked for, where the base has as many positions."""
        asked = config.train.row_tokens
        if base.max_positions is None or asked <= base.max_positions:
            return asked, []
        if base.packs:
            return asked, [
                f"train.row_tokens {asked} is above this base's {base.max_positions} positions: sequences may not be"
            ]
        return base.max_positions, [f"train.row_tokens is lowered to this base's {base.max_positions} positions"]

    def read(
        self, config: Config, base: Any, found: Sources, objects: Mapping[str, Any], *, use_cache: bool
    ) -> RunData:
        reading = reading_of(config, self.row_tokens(config, base)[0], self.kinds)
        return text_data(base, *found, reading, use_cache=use_cache)

    def outputs(self, data: RunData) -> int | None:
        return None

    def score(self, base: Any, examples: Sequence[Any], config: Config, *, slot: int) -> Scored:
        if not any(example.prompt_length for example in examples):
            return Scored()
        metrics, samples = evaluate_text(
            base,
            examples,
            slot=slot,
            max_new_tokens=config.evaluate.max_new_tokens,
            temperature=config.evaluate.temperature,
            task=self,
        )
        answers = [Answer({"prompt": one.prompt, "reference": one.references[0]}, one.text) for one in samples]
        return Scored(metrics, self.footnotes(samples), answers)

    def record(self, config: Config, base: Any) -> Mapping[str, Any]:
        return {}

    def metrics(self, samples: Sequence[Sample]) -> Metrics:
        """Scores of answers, by name; empty without samples."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing")

    def footnotes(self, samples: Sequence[Sample]) -> Mapping[str, str]:
        """What each metric is exactly, by its name."""
        return {}


def text_task(name: str) -> TextTask:
    """A task that learns from text, by its name.

    Raises:
        ConfigError: it learns from something else.
    """
    from manylora.tasks import TASKS

    task = TASKS.get(name)
    if isinstance(task, TextTask):
        return task
    texts = [other for other in TASKS if isinstance(TASKS.get(other), TextTask)]
    raise ConfigError(
        f"the task {name} does not learn from text, so its rows are not read here",
        allowed=", ".join(texts),
        next_step="manylora.train(config, ...) evaluates too: its scores are in summary.json",
    )
