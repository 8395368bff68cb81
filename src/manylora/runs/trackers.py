"""Experiment trackers: thin adapters that send a run's curves to the tools people already watch.

`events.jsonl` is the record; a tracker is a copy of it, so one that fails is named and dropped, and training goes on.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from manylora.errors import ConfigError
from manylora.files import write_json_atomic
from manylora.table import Table

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = "manylora"
"""Name of the project or experiment that runs are filed under, where the tool's own settings name none."""


class Tracker(Protocol):
    """Where curves go. Made from the run folder, the resolved configuration, and the step to resume from, if any."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int | None) -> None: ...

    def log(self, member: str, step: int, values: Mapping[str, float]) -> None:
        """Record one member's values, all finite, after `step` steps."""
        ...

    def close(self) -> None:
        """Send what is still buffered and mark the run as ended."""
        ...


TRACKERS: Table[type[Tracker]] = Table(
    "tracker",
    {
        "tensorboard": "manylora.runs.trackers:TensorBoard",
        "wandb": "manylora.runs.trackers:WandB",
        "mlflow": "manylora.runs.trackers:MLflow",
        "trackio": "manylora.runs.trackers:Trackio",
    },
)


class Trackers:
    """Several trackers as one. One that raises after it was opened is dropped, and `note` is told why."""

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        config: Mapping[str, Any],
        *,
        note: Callable[[str], None],
        resume_step: int | None = None,
    ):
        """Open each named tracker once.

        Raises:
            UnknownName: no such tracker. ConfigError: its library is not installed.
        """
        kinds = {name: TRACKERS.get(name) for name in names}
        self._note = note
        self._open = {name: kind(run, config, resume_step) for name, kind in kinds.items()}

    def log(self, member: str, step: int, values: Mapping[str, float | None]) -> None:
        """Send one member's values to every tracker; values that are missing or not finite are left out."""
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(member, step, finite))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Send the numbers of a step or an evaluation, the latter's as `eval_...`; other events have no curve."""
        if name in ("step", "eval"):
            prefix = "" if name == "step" else "eval_"
            numbers = {
                prefix + key: value
                for key, value in fields.items()
                if key not in ("member", "step", "tick") and isinstance(value, int | float)
            }
            self.log(fields["member"], fields["step"], numbers)

    def close(self) -> None:
        """Close every tracker; harmless when called again."""
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.close)
        self._open.clear()

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - network, quota, a server gone: none may cost the training
            del self._open[name]
            self._note(f"tracker {name} failed and is off for the rest of this run: {type(error).__name__}: {error}")


class TensorBoard:
    """Scalars `<member>/<name>` in the run's `tensorboard/` folder; a resumed run hides what it lives through again."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int | None):
        _require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the events at and after it
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=purge_step)

    def log(self, member: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{member}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; a resumed one goes on in the same place."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int | None):
        wandb = _require("wandb", "wandb")
        known = _remembered(run, "wandb") if resume_step is not None else None
        self._run = wandb.init(
            project=PROJECT,
            name=run.name,
            dir=str(run),
            config=dict(config),
            id=known,
            resume="allow" if known else None,
        )
        self._members: set[str] = set()
        _remember(run, "wandb", self._run.id)

    def log(self, member: str, step: int, values: Mapping[str, float]) -> None:
        if member not in self._members:
            # each member has a step axis of its own: wandb drops whatever comes after a later step
            self._members.add(member)
            self._run.define_metric(f"{member}/*", step_metric=f"{member}/step")
        self._run.log({f"{member}/step": step, **{f"{member}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run on the server or folder that `MLFLOW_TRACKING_URI` names; a resumed one goes on in place."""

    PARAMS_PER_CALL = 100
    LONGEST_PARAM = 500

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int | None):
        self._mlflow = _require("mlflow", "mlflow")
        # the client keeps no global run, so several runs can be open in one process
        self._client = self._mlflow.MlflowClient()
        known = _remembered(run, "mlflow") if resume_step is not None else None
        self._run_id = known or self._create(run.name, config)
        _remember(run, "mlflow", self._run_id)

    def log(self, member: str, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metric = self._mlflow.entities.Metric
        metrics = [metric(f"{member}/{name}", value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)

    def _create(self, name: str, config: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(PROJECT)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
        param = self._mlflow.entities.Param
        params = [param(key, str(value)[: self.LONGEST_PARAM]) for key, value in _flat(config).items()]
        for start in range(0, len(params), self.PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + self.PARAMS_PER_CALL])
        return run_id


class Trackio:
    """A Trackio run, kept on this machine unless Trackio's own settings say otherwise."""

    def __init__(self, run: Path, config: Mapping[str, Any], resume_step: int | None):
        trackio = _require("trackio", "trackio")
        resume = "never" if resume_step is None else "allow"
        self._run = trackio.init(project=PROJECT, name=run.name, config=dict(config), resume=resume)

    def log(self, member: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{member}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # installed, but itself broken
        raise ConfigError(
            f"track: {module} is not installed", next_step=f"pip install {package}, or take it out of `track`"
        ) from error


def _remembered(run: Path, tracker: str) -> str | None:
    path = run / "trackers.json"
    return json.loads(path.read_text(encoding="utf-8")).get(tracker) if path.exists() else None


def _remember(run: Path, tracker: str, name: str) -> None:
    path = run / "trackers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json_atomic(path, {**known, tracker: name})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
