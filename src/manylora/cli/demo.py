"""`manylora demo`: the main job on the builtin base and the bundled data, before and after."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.opened import Opened, open_base
from manylora.cli.output import AsJson, Output, note
from manylora.cli.train import show_summary
from manylora.errors import OutputExists

if TYPE_CHECKING:
    from manylora.evaluation.sample import Sample

BASE = "builtin:tiny-en"
SHOWN, JUDGED = 3, 64
"""Inputs whose answers are printed, and inputs whose attribute values are counted."""
RECIPE: dict[str, Any] = {
    "adapter": {"rank": 16, "alpha": 32},
    "train": {"learning_rate": 4e-3, "epochs": 4, "row_tokens": 256, "rows_per_step": 4},
    "evaluate": {"max_new_tokens": 80},
}


def demo(
    output_folder: Annotated[
        Path | None, typer.Option("--output", help="The run's folder. Default: the first free runs/demo-N.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Teach a small language model a task, before and after."""
    from manylora.config import load_config
    from manylora.data.demo import demo_data_folder
    from manylora.runs.console import Progress
    from manylora.training.run import train as run_training

    output, data = Output(as_json), demo_data_folder()
    if output_folder is not None and output_folder.is_dir() and any(output_folder.iterdir()):
        raise OutputExists(
            f"{str(output_folder)!r} already holds something", next_step="give another --output, or none"
        )
    folder = output_folder or free_folder(Path("runs"))
    files = {"train": data / "train.jsonl", "eval": data / "eval.jsonl"}
    config = load_config(RECIPE | {"base": BASE, "data": files, "output": folder})
    note(f"teaching {BASE} to write a sentence from attributes; the run is kept in {folder}")
    result = run_training(config, console=Progress())
    named, samples = _judge(next(iter(result.summary["adapters"].values())), config)
    _show_samples(output, samples)
    for name, share in named.items():
        output.line(f"{name:>8}: names {share:.0%} of the attribute values it was given")
    output.line()
    show_summary(output, result.run, result.summary)
    output.line('\nnow with data of your own, rows of {"prompt": ..., "completion": ...}:')
    output.line(f"  {next_command(result.run)}")
    output.finish(result.summary | {"named_values": named})


def free_folder(parent: Path) -> Path:
    """The first of demo-1, demo-2, ... that does not exist."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"


def next_command(run: Path) -> str:
    """What to type to train the same way on another file."""
    config = shlex.quote(str(run / "config.yaml"))
    return (
        f"manylora train {config} --set data.train=YOUR.jsonl --set data.eval=null --set data.eval_fraction=0.1"
        " --set output=runs/mine"
    )


def _judge(adapter: str, config: Any) -> tuple[dict[str, float], dict[str, list[Sample]]]:
    """The share of attribute values that base and adapter name on held-out inputs, and their answers."""
    from manylora.cli.evaluate import Settings, read_examples
    from manylora.evaluation.evaluate import evaluate_text
    from manylora.tasks.e2e import share_named
    from manylora.tasks.sft import SFT

    opened: Opened = open_base(config.base, [Path(adapter)], dtype=config.dtype, device=config.device, quiet=True)
    settings = Settings(columns={}, row_tokens=config.train.row_tokens, data=config.data.eval)
    examples = read_examples(opened, settings, quiet=True)
    limit, task = config.evaluate.max_new_tokens, SFT
    samples = {
        name: evaluate_text(opened.base, examples, slot=slot, max_new_tokens=limit, task=task, max_inputs=JUDGED)[1]
        for name, slot in (("base", -1), ("adapter", 0))
    }
    return {name: share_named(found) for name, found in samples.items()}, samples


def _show_samples(output: Output, samples: dict[str, list[Sample]]) -> None:
    for place in range(min(SHOWN, len(samples["adapter"]))):
        output.line(f"\n  prompt: {samples['adapter'][place].prompt.strip()}")
        for name, found in samples.items():
            output.line(f"{name:>8}: {' '.join(found[place].text.split())}")
        output.line(f"   human: {samples['adapter'][place].references[0].strip()}")
    output.line()
