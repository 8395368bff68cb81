"""The main job as a user does it: train, look, evaluate, generate, chat, go on."""

from __future__ import annotations

import io
import json
import shutil

from safetensors.torch import load_file


def test_training_leaves_a_complete_run_folder(manylora, config):
    done = manylora("train", config, "--json")
    assert done.code == 0, done.err
    run = config.parent / "run"
    for name in ("config.yaml", "manifest.json", "events.jsonl", "samples.jsonl", "summary.json", "report.html"):
        assert (run / name).is_file(), name
    assert json.loads((run / "summary.json").read_text()) == done.result
    (adapter,) = done.result["adapters"].values()
    assert load_file(f"{adapter}/adapter_model.safetensors")
    keys = "run eval base_eval tokens tokens_per_s wall_s peak_bytes expected_peak_bytes trainable_parameters"
    for key in keys.split():
        assert key in done.result


def test_what_is_printed_for_people_says_before_after_and_where(manylora, config):
    done = manylora("train", config, "--set", "train.steps=1", "--set", f"output={config.parent / 'other'}")
    assert done.code == 0, done.err
    for word in ("base", "adapter", "loss", "report.html", str(config.parent / "other")):
        assert word in done.out
    assert "chosen" in done.err or "device" in done.err


def test_a_run_repeats_from_its_own_configuration(manylora, trained, tmp_path):
    again = manylora("train", trained / "config.yaml", "--set", f"output={tmp_path / 'again'}", "--json")
    assert again.code == 0, again.err
    first = json.loads((trained / "summary.json").read_text())
    assert again.result["eval"] == first["eval"]
    (one,), (other,) = first["adapters"].values(), again.result["adapters"].values()
    assert read_bytes(one) == read_bytes(other)


def test_a_finished_run_resumes_to_its_own_summary(manylora, trained):
    done = manylora("train", trained / "config.yaml", "--resume", "--json")
    assert done.code == 0, done.err
    assert done.result == json.loads((trained / "summary.json").read_text())


def test_evaluate_puts_base_and_adapter_side_by_side(manylora, trained):
    done = manylora("evaluate", trained, "--json", "--max-new-tokens", 4)
    assert done.code == 0, done.err
    summary = json.loads((trained / "summary.json").read_text())
    base, adapter = done.result["eval"].values()
    assert set(base) == {"loss", "perplexity", "tokens", "bleu", "exact_match"}
    assert abs(adapter["loss"] - summary["eval"]["loss"]) < 1e-5
    assert abs(base["loss"] - summary["base_eval"]["loss"]) < 1e-5


def test_evaluate_takes_an_adapter_or_a_base_with_a_file(manylora, trained, tiny_base_folder):
    rows = trained.parent / "eval.jsonl"
    (adapter,) = (trained / "adapters").iterdir()
    one = manylora("evaluate", adapter, "--data", rows, "--no-text", "--dtype", "float32", "--json")
    assert one.code == 0, one.err
    two = manylora("evaluate", tiny_base_folder, "--data", rows, "--no-text", "--dtype", "float32", "--json")
    assert two.code == 0, two.err
    assert one.result["eval"]["base"] == two.result["eval"]["base"]
    assert len(one.result["eval"]) == 2


def test_generate_compares_adapters_and_base_in_one_batch(manylora, trained, tmp_path):
    (adapter,) = (trained / "adapters").iterdir()
    twin = tmp_path / "twin"
    shutil.copytree(adapter, twin)
    done = manylora(
        "generate", "--adapter", trained, "--adapter", twin, "--with-base", "--prompt", "name : x\n", "--prompt", "the",
        "--max-new-tokens", 5, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.result["results"]) == 2
    for result in done.result["results"]:
        answers = result["answers"]
        assert set(answers) == {"base", adapter.name, "twin"}
        assert answers["twin"] == answers[adapter.name]


def test_generate_draws_the_same_text_from_the_same_seed(manylora, tiny_base_folder):
    words = ["generate", "--base", tiny_base_folder, "--prompt", "the", "--max-new-tokens", 12, "--temperature", 1.5]
    one, two, other = (manylora(*words, "--seed", seed) for seed in (3, 3, 4))
    assert one.code == 0, one.err
    assert one.out == two.out != other.out


def test_generate_reads_prompts_from_a_file(manylora, tiny_base_folder, tmp_path):
    (tmp_path / "p.txt").write_text("the dog\n\nthe fox\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "the dog"}\n{"prompt": "the fox"}\n')
    found = [
        manylora("generate", "--base", tiny_base_folder, "--prompts", tmp_path / name, "--max-new-tokens", 3, "--json")
        for name in ("p.txt", "p.jsonl")
    ]
    assert [done.code for done in found] == [0, 0], found
    assert found[0].result == found[1].result
    assert [result["prompt"] for result in found[0].result["results"]] == ["the dog", "the fox"]


def test_chat_streams_answers_and_forgets_on_reset(manylora, tiny_base_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nhello\n\n/quit\nnever read\n"))
    done = manylora("chat", "--base", tiny_base_folder, "--max-new-tokens", 4, "--json")
    assert done.code == 0, done.err
    one, two = done.result["turns"]
    assert one == two, "after /reset the same words get the same greedy answer"


def test_chat_with_an_adapter_ends_with_the_input(manylora, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    done = manylora("chat", "--adapter", trained, "--max-new-tokens", 4)
    assert done.code == 0, done.err
    assert done.out.endswith("\n")


def test_inspect_shows_the_sites_of_a_base(manylora, tiny_base_folder):
    short = manylora("inspect", tiny_base_folder)
    assert short.code == 0, short.err
    assert "LlamaForCausalLM" in short.out
    assert any(line.split()[:2] == ["q_proj", "linear"] for line in short.out.splitlines())
    full = manylora("inspect", tiny_base_folder, "--sites", "--json")
    assert "model.layers.1.self_attn.q_proj" in {site["name"] for site in full.result["sites"]}
    assert full.result["fingerprint"].startswith("sha256:")


def test_inspect_shows_what_an_adapter_is(manylora, trained, tiny_base_folder):
    (adapter,) = (trained / "adapters").iterdir()
    done = manylora("inspect", adapter, "--json")
    assert done.code == 0, done.err
    assert done.result["kind"] == "adapter"
    assert done.result["ranks"] == "2 at 14 sites"
    assert done.result["scales"] == "16"
    assert done.result["base"] == str(tiny_base_folder)


def test_inspect_shows_the_state_of_a_run(manylora, trained):
    done = manylora("inspect", trained, "--json")
    assert done.code == 0, done.err
    assert done.result["state"] == "finished"
    assert done.result["steps"] == 4
    assert len(done.result["adapters"]) == 1


def test_doctor_measures_this_machine(manylora):
    done = manylora("doctor", "--json")
    assert done.code == 0, done.err
    assert done.result["gflops"]["float32"] > 0
    assert done.result["versions"]["torch"]


def read_bytes(adapter: str) -> bytes:
    with open(f"{adapter}/adapter_model.safetensors", "rb") as file:  # noqa: PTH123
        return file.read()
