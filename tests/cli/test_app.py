"""The command as a whole: its verbs, its exit codes, its start."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from manylora import cli
from manylora.cli import app
from manylora.errors import NonFiniteLoss, SiteNotFound


def fails_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def main(self, **_):
            raise error

    monkeypatch.setattr(app, "build", Failing)


def test_every_verb_has_help_whose_first_line_is_short(capsys):
    for name in app.VERBS:
        assert app.run([name, "--help"]) == 0
        assert name in capsys.readouterr().out
        first = app.VERBS.get(name).__doc__.splitlines()[0]
        assert len(first) < 60, first


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "train"),
        (["train", "--sett", "a=b"], "--set"),
        (["generate", "--temperature", "warm"], "--temperature"),
        (["inspect"], "target"),
    ],
)
def test_a_mistyped_command_line_is_the_users_mistake(words, told, capsys):
    assert app.run(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert told in error
    assert "--help" in error


def test_no_verb_at_all_shows_the_help(capsys):
    assert app.run([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    import manylora

    assert app.run(["--version"]) == 0
    assert manylora.__version__ in capsys.readouterr().out


def test_a_users_mistake_is_one_block_without_a_traceback(monkeypatch, capsys):
    fails_with(SiteNotFound("no site matches 'q_porj'", nearest=["q_proj (30)"], next_step="inspect"), monkeypatch)
    assert app.run(["train"]) == 2
    assert capsys.readouterr().err == (
        "Error: SiteNotFound: no site matches 'q_porj'\n  nearest: q_proj (30)\n  next: inspect\n"
    )


def test_a_fault_of_ours_exits_1_and_shows_its_traceback_on_demand(monkeypatch, capsys):
    fails_with(RuntimeError("boom"), monkeypatch)
    assert app.run(["train"]) == 1
    quiet = capsys.readouterr().err
    assert quiet.startswith("Error: RuntimeError: boom")
    assert "Traceback" not in quiet
    assert app.run(["train", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("MANYLORA_DEBUG", "1")
    assert app.run(["train"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_no_mistake_of_the_user(monkeypatch, capsys):
    fails_with(NonFiniteLoss("loss nan at step 3"), monkeypatch)
    assert app.run(["train"]) == 1
    assert "NonFiniteLoss: loss nan" in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch, capsys):
    fails_with(KeyboardInterrupt(), monkeypatch)
    assert app.run(["train"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_main_leaves_with_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["manylora", "trian"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2


def cpu_seconds(*words: str) -> float:
    """Processor time of a child process: unlike the wall's, it does not grow when the machine is busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.alone
def test_help_answers_in_under_0_3_s():
    assert min(cpu_seconds("-m", "manylora", "--help") for _ in range(3)) < 0.3


@pytest.mark.alone
def test_import_takes_under_half_a_second_and_brings_nothing_heavy():
    assert min(cpu_seconds("-c", "import manylora") for _ in range(3)) < 0.5
    code = (
        "import sys, manylora, manylora.cli.app as app; app.build();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_the_version_has_a_short_option(capsys) -> None:
    from manylora import __version__

    assert app.run(["-V"]) == 0
    assert capsys.readouterr().out.strip() == f"manylora {__version__}"
