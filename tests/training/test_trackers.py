from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manylora.errors import ConfigError, UnknownName
from manylora.runs.trackers import TRACKERS, Trackers

CONFIG = {"base": "builtin:tiny-en", "train": {"learning_rate": 2e-4, "betas": [0.9, 0.999]}, "data": {}}


class Calls(list):
    """A stand-in that records every call made on it, and answers what a test asks it to."""

    def recorder(self, name: str, answer: Any = None):
        def call(*arguments: Any, **options: Any) -> Any:
            self.append((name, arguments, options))
            return answer

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, options) for called, arguments, options in self if called == name]


def no_note(text: str) -> None:
    pytest.fail(f"no tracker should have failed: {text}")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_library_that_is_missing_is_an_error_with_the_command_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        Trackers([name], tmp_path, CONFIG, note=no_note)


def test_an_unknown_tracker_is_named_with_its_neighbour_before_any_is_opened(tmp_path):
    with pytest.raises(UnknownName, match="nearest: tensorboard"):
        Trackers(["tensorboard", "tensorbord"], tmp_path, CONFIG, note=no_note)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_module_imports_no_tracker():
    program = (
        "import sys, manylora.runs.trackers as t\n"
        "loaded = {'tensorboard', 'torch', 'wandb', 'mlflow', 'trackio'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_holds_the_curves_by_member_without_missing_values(tmp_path):
    trackers = Trackers(["tensorboard"], tmp_path, CONFIG, note=no_note)
    trackers.log("a", 1, {"loss": 2.0, "bleu": None})
    trackers.log("a", 2, {"loss": math.nan})
    trackers.log("b", 2, {"loss": 1.0})
    trackers.close()
    assert curves(tmp_path / "tensorboard") == {"a/loss": [(1, 2.0)], "b/loss": [(2, 1.0)]}


def test_tensorboard_hides_the_steps_that_a_resumed_run_makes_again(tmp_path):
    first = Trackers(["tensorboard"], tmp_path, CONFIG, note=no_note)
    for step in (1, 2, 3):
        first.log("a", step, {"loss": 10.0 + step})
    first.close()
    second = Trackers(["tensorboard"], tmp_path, CONFIG, note=no_note, resume_step=2)
    second.log("a", 3, {"loss": 20.0})
    second.close()
    assert curves(tmp_path / "tensorboard") == {"a/loss": [(1, 11.0), (2, 12.0), (3, 20.0)]}


def test_wandb_gets_a_step_axis_for_each_member_and_resumes_the_same_run(tmp_path, monkeypatch):
    calls = Calls()
    run = SimpleNamespace(
        id="x7", define_metric=calls.recorder("define"), log=calls.recorder("log"), finish=calls.recorder("finish")
    )
    install(monkeypatch, "wandb", init=calls.recorder("init", run))
    for resume_step in (None, 5):
        trackers = Trackers(["wandb"], tmp_path, CONFIG, note=no_note, resume_step=resume_step)
        trackers.log("a", 6, {"loss": 0.5})
        trackers.log("a", 7, {"loss": 0.25})
        trackers.close()
    (_, fresh), (_, resumed) = calls.of("init")
    assert (fresh["id"], fresh["resume"], fresh["config"]) == (None, None, CONFIG)
    assert (resumed["id"], resumed["resume"]) == ("x7", "allow")
    assert calls.of("define")[0] == (("a/*",), {"step_metric": "a/step"})
    assert [arguments[0] for arguments, _ in calls.of("log")[:2]] == [
        {"a/step": 6, "a/loss": 0.5},
        {"a/step": 7, "a/loss": 0.25},
    ]
    assert len(calls.of("finish")) == 2


def test_mlflow_gets_flat_settings_and_metrics_and_resumes_the_same_run(tmp_path, monkeypatch):
    calls = Calls()
    client = SimpleNamespace(
        get_experiment_by_name=calls.recorder("find"),
        create_experiment=calls.recorder("experiment", "1"),
        create_run=calls.recorder("run", SimpleNamespace(info=SimpleNamespace(run_id="r1"))),
        log_batch=calls.recorder("batch"),
        set_terminated=calls.recorder("end"),
    )
    entities = SimpleNamespace(Metric=lambda *values: values, Param=lambda key, value: (key, value))
    install(monkeypatch, "mlflow", MlflowClient=lambda: client, entities=entities)
    for resume_step in (None, 1):
        trackers = Trackers(["mlflow"], tmp_path, CONFIG, note=no_note, resume_step=resume_step)
        trackers.log("a", 2, {"loss": 0.5})
        trackers.close()
    assert len(calls.of("run")) == 1
    params, metrics, again = calls.of("batch")
    assert params == (
        ("r1",),
        {
            "params": [
                ("base", "builtin:tiny-en"),
                ("train.learning_rate", "0.0002"),
                ("train.betas", "[0.9, 0.999]"),
                ("data", "{}"),
            ]
        },
    )
    for arguments, options in (metrics, again):
        ((name, value, now_ms, step),) = options["metrics"]
        assert (arguments, name, value, step) == (("r1",), "a/loss", 0.5, 2)
        assert now_ms > 1.6e12
    assert calls.of("end") == [(("r1",), {}), (("r1",), {})]


def test_trackio_logs_by_step_and_resumes_by_name(tmp_path, monkeypatch):
    calls = Calls()
    run = SimpleNamespace(log=calls.recorder("log"), finish=calls.recorder("finish"))
    install(monkeypatch, "trackio", init=calls.recorder("init", run))
    for resume_step in (None, 1):
        trackers = Trackers(["trackio"], tmp_path / "first", CONFIG, note=no_note, resume_step=resume_step)
        trackers.log("a", 2, {"loss": 0.5})
        trackers.close()
    assert [options["resume"] for _, options in calls.of("init")] == ["never", "allow"]
    assert {options["name"] for _, options in calls.of("init")} == {"first"}
    assert calls.of("log")[0] == (({"a/loss": 0.5},), {"step": 2})


def test_a_tracker_that_fails_is_named_and_dropped_and_the_others_go_on(tmp_path, monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    install(monkeypatch, "trackio", init=lambda **_: SimpleNamespace(log=gone, finish=gone))
    notes: list[str] = []
    trackers = Trackers(["trackio", "tensorboard"], tmp_path, CONFIG, note=notes.append)
    for step in (1, 2):
        trackers.log("a", step, {"loss": 1.0})
    trackers.close()
    assert len(notes) == 1
    assert "trackio" in notes[0]
    assert "no route to host" in notes[0]
    assert curves(tmp_path / "tensorboard") == {"a/loss": [(1, 1.0), (2, 1.0)]}


def test_every_tracker_in_the_table_exists():
    for name in TRACKERS:
        assert {"log", "close"} <= set(dir(TRACKERS.get(name)))
