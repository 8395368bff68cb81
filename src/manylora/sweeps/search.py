"""A search: proposes the values of trials, learns from their losses, and is kept in a file that optuna reads.

The file is optuna's own journal: `optuna-dashboard RUN/optuna.log` shows a sweep while it runs and afterwards. A trial
is one line of it, written with all its values at once, so a search that is killed at any moment resumes as if it had
not been. No torch; optuna is imported when a search is made.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manylora.errors import CheckpointBroken, ConfigError
from manylora.sweeps.searches import SEARCHES, Question
from manylora.sweeps.searches.grid import grid_axes, grid_size, point, shuffled
from manylora.sweeps.space import Range, Space

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

State = Literal["done", "stopped", "failed"]

REDRAWS = 8
"""A trial that would repeat another's values is drawn again so often; then it takes a point not tried yet."""
LOCK_SECONDS = 5
"""A lock on the journal older than this was left behind by a process that was killed."""
LEAST_FOR_IMPORTANCES = 4
"""Ended trials below which the importance of a key is only chance."""
_MARK = "manylora"
_LINE = b'{"op_code":'
"""How every line of a journal begins."""


class Search:
    """Proposes trials by one of `SEARCHES`, numbered from 0 and in that order.

    `num_trials` None: the whole grid; a smaller number takes so many of its points, spread by the seed. No search
    proposes the same values twice, so where a space holds fewer trials than asked for, `num_trials` is their number.

    Raises:
        UnknownName: no such search. ConfigError: no number of trials, a range that does not suit the search, or a file
            that holds another search. CheckpointBroken: a file that is no journal of optuna.
    """

    def __init__(
        self, name: str, space: Space, *, seed: int, num_trials: int | None, storage: Path | None, study_name: str
    ) -> None:
        self._propose = SEARCHES.get(name)
        self._space = space
        self._seed = seed
        self._num_trials = _num_trials(name, space, num_trials)
        with _quiet():
            self._storage, self._study = _open(storage, study_name)
            self._check_same({"search": name, "seed": seed, "space": space.described()}, storage)

    @property
    def num_trials(self) -> int:
        """How many trials this search proposes."""
        return self._num_trials

    def propose(self, number: int) -> dict[str, Any]:
        """The value of every searched key, for one trial; the stored one where it was proposed before.

        Semantics: a pure function of (seed, number, num_trials, the trials before this one as they now stand).

        Raises:
            ValueError: a number beyond `num_trials`, or one whose predecessor was not proposed.
        """
        if not 0 <= number < self.num_trials:
            raise ValueError(f"trial {number} is asked for, and the search has {self.num_trials}, counted from 0")
        with _quiet():
            trials = self._trials()
            if number > len(trials):
                raise ValueError(f"trial {number} is asked for before trial {len(trials)}")
            if number == len(trials):
                self._add(self._fresh(trials))
                trials = self._trials()
            return self._space.decode(trials[number].params)

    def report(self, number: int, step: int, loss: float) -> None:
        """Stores an eval loss on the way, `step` in trained tokens; the first for a step counts."""
        with _quiet():
            trial = self._trial(number)
            if not trial.state.is_finished() and step not in trial.intermediate_values:
                self._storage.set_trial_intermediate_value(trial._trial_id, step, float(loss))

    def tell(self, number: int, loss: float | None, state: State) -> None:
        """Ends a trial: done with its final loss, stopped early with its last, or failed; the first word counts.

        A trial that is done without a loss that is a number has failed.
        """
        from optuna.trial import TrialState

        known = loss is not None and not math.isnan(loss)
        if state == "failed" or (state == "done" and not known):
            ended = TrialState.FAIL
        else:
            ended = TrialState.COMPLETE if state == "done" else TrialState.PRUNED
        with _quiet():
            trial = self._trial(number)
            if not trial.state.is_finished():
                values = [float(loss)] if loss is not None and known and ended != TrialState.FAIL else None
                self._storage.set_trial_state_values(trial._trial_id, ended, values)

    def importances(self) -> dict[str, float]:
        """How much each key decides whether a trial is among the best tenth: shares of 1, largest first.

        Stopped trials count with their last loss; {} with too few trials. Source: PED-ANOVA, arXiv 2304.10255.
        """
        import optuna

        with _quiet():
            study = optuna.create_study(direction="minimize")
            for trial in self._trials():
                if trial.value is not None and math.isfinite(trial.value):
                    study.add_trial(
                        optuna.trial.create_trial(
                            value=trial.value, params=trial.params, distributions=trial.distributions
                        )
                    )
            if len(study.trials) < LEAST_FOR_IMPORTANCES:
                return {}
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        # Ties in the order written: optuna's goes through a set, which changes from process to process.
        return dict(sorted(((key, found[key]) for key in self._space.dimensions), key=lambda pair: -pair[1]))

    def _fresh(self, trials: list[FrozenTrial]) -> dict[str, Any]:
        """The values of the next trial, unlike those of every other."""
        used = {_key(trial.params) for trial in trials}
        number = len(trials)
        for attempt in range(REDRAWS):
            digest = hashlib.sha256(f"{self._seed}/{number}/{attempt}".encode()).digest()
            drawn = self._propose(
                Question(
                    space=self._space,
                    number=number,
                    num_trials=self.num_trials,
                    seed=self._seed,
                    draw=int.from_bytes(digest[:4], "big"),
                    trials=trials,
                )
            )
            params = self._space.settled(drawn)
            if _key(params) not in used:
                return params
        axes = {key: dimension.values() for key, dimension in self._space.dimensions.items()}
        finite = {key: axis for key, axis in axes.items() if axis is not None}
        # A range without steps does not repeat itself, so none is here; and of one point more than there are trials,
        # one is new.
        points = (point(finite, index) for index in shuffled(grid_size(finite), number + 1, self._seed))
        return next(params for params in points if _key(params) not in used)

    def _add(self, params: dict[str, Any]) -> None:
        from optuna.trial import TrialState, create_trial

        self._study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=self._space.distributions())
        )

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, number: int) -> FrozenTrial:
        trials = self._trials()
        if not 0 <= number < len(trials):
            raise ValueError(f"trial {number} was not proposed; the search has proposed {len(trials)}, counted from 0")
        return trials[number]

    def _check_same(self, mark: dict[str, Any], storage: Path | None) -> None:
        """Marks a new study with what it searches, or compares the mark of one that is resumed."""
        found = self._study.user_attrs.get(_MARK)
        if found is None and not self._trials():
            self._study.set_user_attr(_MARK, mark)
        elif found != mark:
            theirs = found if isinstance(found, Mapping) else {}
            other = next((key for key in mark if theirs.get(key) != mark[key]), "search")
            raise ConfigError(
                f"{storage} holds another search: its {other} is {theirs.get(other)!r}, here it is {mark[other]!r}",
                allowed="the configuration that it was begun with",
                next_step="resume with that one, or set another output",
            )


def _num_trials(name: str, space: Space, asked: int | None) -> int:
    """How many trials there will be.

    Raises:
        ConfigError: see `Search`.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"sweep.trials is {asked}", allowed="at least 1")
    if name == "grid":
        most: int | None = grid_size(grid_axes(space))
    else:
        for key, dimension in space.dimensions.items():
            if isinstance(dimension, Range) and dimension.num is not None:
                raise ConfigError(
                    f"sweep.space.{key}.num is {dimension.num}, and sweep.search is {name}",
                    allowed="num only with search: grid",
                    next_step="leave num out, or give step for values that lie apart",
                )
        most = space.size
    if asked is None:
        if name != "grid" or most is None:
            raise ConfigError(
                f"sweep.trials is not given, and search: {name} has no end of its own", next_step="set sweep.trials"
            )
        return most
    return asked if most is None else min(asked, most)


def _key(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))


def _open(path: Path | None, name: str) -> tuple[BaseStorage, Study]:
    """The storage and the study in it, made where there is none yet.

    Raises:
        CheckpointBroken: the file is no journal of optuna.
    """
    import optuna
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    if path is None:
        storage: BaseStorage = InMemoryStorage()
    else:
        _mend(path)
        # Absolute, and not optuna's own lock: that one is a link to the path as given, and where it dangles the wait
        # for a lock that was left behind has no end. The two exclude each other.
        file = str(path.absolute())
        try:
            storage = JournalStorage(JournalFileBackend(file, JournalFileOpenLock(file, grace_period=LOCK_SECONDS)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, str(error)) from error
    if name in {study.study_name for study in storage.get_all_studies()}:
        return storage, optuna.load_study(storage=storage, study_name=name)
    return storage, optuna.create_study(storage=storage, study_name=name, direction="minimize")


def _mend(path: Path) -> None:
    """Takes away the end of a journal whose writer was killed within a line; optuna would write on behind it.

    Raises:
        CheckpointBroken: the last line is no line of a journal; nothing is taken away.
    """
    if not path.exists():
        return
    *lines, torn = path.read_bytes().split(b"\n")
    # optuna looks at the last line only when another follows it.
    for line in (*lines[-1:], torn):
        if line[: len(_LINE)] != _LINE[: len(line)]:
            raise _broken(path, f"it ends in {line[:40]!r}")
    if torn:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - len(torn))


def _broken(path: Path, why: str) -> CheckpointBroken:
    return CheckpointBroken(
        f"{path} is no journal of optuna: {why}", next_step="set another output, or move the file away"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps optuna's log lines and warnings to itself: they speak of its parts, and this house says what it does."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
