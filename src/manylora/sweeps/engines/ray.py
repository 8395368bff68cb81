"""The members of a sweep in several processes, on this machine or on a cluster, which Ray starts and watches.

Every worker holds the base and a bank of its own and runs the same loop as everywhere; the director, the log, trackers
and the terminal are the driver's. The folder of the run, the base and the data must be at the same paths on all
machines: workers write checkpoints and adapters straight into the run's folder.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import ConfigError, UserError
from manylora.runs.events import EventLog, read_events
from manylora.runs.trackers import Trackers
from manylora.sweeps.engines import Engine
from manylora.sweeps.engines.ray_hub import FILE_NAME, Hub, Journal
from manylora.sweeps.engines.ray_shelf import DiskShelf
from manylora.sweeps.engines.ray_worker import Task, Worker
from manylora.training.run import interruptible

if TYPE_CHECKING:
    from manylora.config import Config
    from manylora.runs.folder import RunFolder
    from manylora.sweeps.director import Director
    from manylora.sweeps.ledger import Ledger
    from manylora.training.prepare import Stock

MOST_DEATHS = 3
"""Deaths for each worker, with no report and no ending in between, after which a sweep gives up."""
STORE_BYTES = 100 * 2**20
"""Ray's own store of objects; only messages go through it."""
WAIT_S = 0.5
"""Longest time until Ctrl-C is seen."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Of Ray's own settings: no reports of usage to the network, and no tip about what its next version does."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where workers run: how many there are, what each takes of the cluster, and the device it trains on."""

    num_workers: int
    num_threads: int
    num_gpus: int
    device: str


def check(config: Config) -> None:
    """Pass a sweep that this engine can run here.

    Raises:
        ConfigError: Ray is not installed, or an object of this process that workers cannot have.
    """
    _ray()
    named = {key: [place.path for place in getattr(config.data, key)] for key in ("train", "eval")}
    for key, places in {"base": [config.base], **{f"data.{key}": paths for key, paths in named.items()}}.items():
        for place in places:
            if place.startswith("python:"):
                raise ConfigError(
                    f"{key} is {place}, an object of this process, and sweep.engine ray trains in others",
                    next_step="save it and name its path, or set sweep.engine: local",
                )


def run(
    config: Config,
    stock: Stock,
    folder: RunFolder,
    director: Director,
    ledger: Ledger,
    *,
    likely: Sequence[Config],
    resume: bool,
) -> None:
    """Train a sweep to its end; `likely` are configurations that it will train.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once every worker has written a checkpoint. UserError: see
            `training.loop.Loop`; or the workers die again and again.
    """
    sweep = config.sweep
    assert sweep is not None
    shelf = DiskShelf(folder.checkpoints, stock.config.checkpoint.keep)
    with EventLog(folder.path) as log, interruptible() as interrupted:
        hub = Hub(director, ledger, Journal(folder.checkpoints / FILE_NAME), shelf, log)
        resume_step = None
        if resume:
            hub.resume()
            shelf.clear()
            resume_step = max((event.get("step", 0) for event in read_events(folder.path)), default=0)
            ledger.note(f"resumes with {len(director.under_way())} members under way")
        trackers = Trackers(
            stock.config.track, folder.path, stock.config.to_dict(), note=ledger.note, resume_step=resume_step
        )
        ledger.open(log, trackers)
        try:
            with cluster(sweep.workers, stock.base.device.type, config.device) as places:
                if places.num_workers < sweep.workers:
                    ledger.note(f"{places.num_workers} workers and not {sweep.workers}: the cluster has no more GPUs")

                def start() -> tuple[str, Any]:
                    name = shelf.add()
                    task = Task(
                        name=name,
                        config=config,
                        base=stock.config,
                        likely=likely,
                        num_trials=director.num_trials,
                        num_workers=places.num_workers,
                        num_threads=places.num_threads,
                        device=places.device,
                        use_cache=stock.use_cache,
                        run=folder.path.absolute(),
                        home=Path.cwd(),
                    )
                    return name, _actor(places).remote(task)

                _serve(hub, shelf, ledger, start, places.num_workers, interrupted)
            if hub.stopping:
                ledger.note("interrupted; --resume goes on from what the workers have written")
                raise KeyboardInterrupt
        finally:
            trackers.close()


def _serve(
    hub: Hub,
    shelf: DiskShelf,
    ledger: Ledger,
    start: Callable[[], tuple[str, Any]],
    num_workers: int,
    interrupted: Callable[[], bool],
) -> None:
    """Start workers and answer them until the sweep is over or interrupted; one that dies is replaced."""
    ray = _ray()
    handles: dict[str, Any] = {}
    calls: dict[Any, str] = {}
    deaths = 0
    progress = hub.progress

    def begin() -> None:
        name, handle = start()
        handles[name] = handle
        hub.join(name)
        call(name, None)

    def call(name: str, answer: Any) -> None:
        calls[handles[name].exchange.remote(answer, hub.stopping)] = name

    try:
        for _ in range(num_workers):
            begin()
        while calls and not hub.over and not (hub.stopping and hub.idle):
            hub.stopping = hub.stopping or interrupted()
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=WAIT_S)
            for ref in ready:
                name = calls.pop(ref)
                try:
                    items = ray.get(ref)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError as error:
                    ray.kill(handles.pop(name))
                    lost = hub.lose(name)
                    shelf.clear([name])
                    ledger.note(f"{name} died; {', '.join(lost) or 'no member'} goes on elsewhere")
                    deaths = deaths + 1 if hub.progress == progress else 1
                    progress = hub.progress
                    if deaths > MOST_DEATHS * num_workers:
                        raise _hopeless(deaths, error) from error
                    if not hub.stopping:
                        begin()
                    continue
                answer = None
                for what, *told in items:
                    if what == "broken":
                        raise told[0]
                    if what == "finished":
                        hub.leave(name)
                        del handles[name]
                        break
                    answer = hub.take(name, what, *told) or answer
                else:
                    call(name, answer or hub.poll(name))
    finally:
        for handle in handles.values():
            ray.kill(handle)


def _hopeless(deaths: int, error: Exception) -> UserError:
    return UserError(
        f"workers died {deaths} times and nothing was trained in between: {str(error).splitlines()[0]}",
        next_step="look at Ray's logs in /tmp/ray; if memory ran out, lower sweep.concurrent or sweep.workers. "
        "--resume goes on",
    )


@contextmanager
def cluster(num_workers: int, device_type: str, asked: str) -> Iterator[Places]:
    """A cluster for so many workers: the one that RAY_ADDRESS names, or one on this machine for the time being.

    `device_type` is of the driver's base, `asked` what the configuration says of the device.

    Raises:
        ConfigError: no cluster at RAY_ADDRESS, or none with the device that is asked for.
    """
    import torch

    ray = _ray()
    wants_gpus = asked == "auto" or asked.startswith("cuda")
    begun = not ray.is_initialized()
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if begun:
            _connect(num_workers, torch.get_num_threads(), wants_gpus)
        resources = ray.cluster_resources()
        num_gpus = int(resources.get("GPU", 0)) if wants_gpus else 0
        if not num_gpus and asked.startswith("cuda"):
            raise ConfigError(f"device is {asked}, and the Ray cluster has no GPU", allowed="auto, cpu")
        if num_gpus:
            num_workers = min(num_workers, num_gpus)
        cpus = [node["Resources"]["CPU"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]]
        on_one = math.ceil(num_workers / max(1, len(cpus)))
        yield Places(
            num_workers=num_workers,
            num_threads=max(1, int(min(cpus, default=1) // on_one)),
            num_gpus=1 if num_gpus else 0,
            device="cuda" if num_gpus else "cpu" if device_type == "cuda" else device_type,
        )
    finally:
        if begun and ray.is_initialized():
            ray.shutdown()
        logger.setLevel(level)


def _connect(num_workers: int, num_threads: int, wants_gpus: bool) -> None:
    ray = _ray()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        ray.init(
            address="local",
            num_cpus=num_workers * max(1, num_threads // num_workers),
            num_gpus=None if wants_gpus else 0,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            **quiet,
        )
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and no Ray cluster answers there: {str(error).splitlines()[0]}",
            next_step="start one with `ray start --head`, or unset RAY_ADDRESS to train on this machine",
        ) from error


def _actor(places: Places) -> Any:
    """The class of workers as Ray starts them: one GPU each, or so many CPUs; they are not restarted by Ray itself."""
    options = {"num_gpus": places.num_gpus, "num_cpus": 1 if places.num_gpus else places.num_threads}
    return _ray().remote(Worker).options(**options, scheduling_strategy="SPREAD", max_restarts=0)


def _ray() -> Any:
    """Ray itself.

    Raises:
        ConfigError: it is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)  # Ray reads some of them when it is imported
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise  # installed, but itself broken
        raise ConfigError(
            "sweep.engine is ray, and Ray is not installed", next_step="pip install manylora[ray]"
        ) from error
    return ray


RAY = Engine(run=run, check=check)
