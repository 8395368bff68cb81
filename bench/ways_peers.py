"""What the benchmarks let peers do, each in a worker of its own (see workers.py), in an environment without manylora.

PEFT's plain loop is that of its guide: a model, AdamW, `loss.backward()`. TRL's is its SFTTrainer.
"""

from __future__ import annotations

import ctypes
from typing import Any

from workers import Gate, Way, serve

PEFT = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "peft",
    "bitsandbytes",
    "numpy",
)
TRL = (*PEFT, "transformers.models.auto.tokenization_auto", "datasets", "trl.trainer.sft_trainer")


def base_of(settings: dict[str, Any]) -> Any:
    """The base: dense, or with 4-bit weights prepared as PEFT's guide to quantisation says."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, settings["dtype"])
    if settings.get("quantize") is None:
        return AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype)
    from peft import prepare_model_for_kbit_training

    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=settings["quantize"], bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=settings["double"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        settings["base"], dtype=dtype, quantization_config=packing, device_map="cpu"
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def adapter(settings: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Write a fresh adapter whose B is not zero, so that every gradient is there from the first step."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    spec = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear",
                      use_dora=settings.get("method") == "dora", task_type="CAUSAL_LM")  # fmt: skip
    model: Any = get_peft_model(base_of({**settings, "quantize": None}), spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(settings["adapter"])
    return {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def adapted(settings: dict[str, Any]) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base_of(settings), settings["adapter"], is_trainable=True)


def tokens_of(settings: dict[str, Any]) -> Any:
    import numpy as np
    import torch

    with np.load(settings["file"]) as held:
        return torch.tensor(held["tokens"], dtype=torch.long)


def gradients(settings: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """The loss of the first step; the gradient of each factor goes to a safetensors file by site."""
    from safetensors.torch import save_file

    model = adapted(settings)
    model.train()
    tokens = tokens_of(settings)[0]
    found = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    found.backward()
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            site = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            for theirs, own in (("lora_A", "a"), ("lora_B", "b"), ("lora_magnitude_vector", "magnitude")):
                site = site.replace(f".{theirs}", f".{own}")
            named[site] = parameter.grad.float().contiguous()
    save_file(named, settings["gradients"])
    return {"loss": float(found)}


def plain(settings: dict[str, Any], gate: Gate) -> None:
    """PEFT in a plain loop; `keep_freed`: with the allocator told to keep what is freed, as manylora's runs tell it."""
    import torch

    if settings.get("keep_freed"):
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    model = adapted(settings)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gate.facts = {"factors": str(trained[0].dtype), "base": str(next(model.parameters()).dtype)}
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    while True:
        for tokens in tokens_of(settings):
            found = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            found.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            gate.step(found.item(), tokens[:, 1:].numel())


def trainer_of(settings: dict[str, Any], count: int | None, gate: Gate | None) -> tuple[Any, list[int]]:
    """TRL's trainer, and the list to which it adds the targets of each batch that it collates."""
    import json
    from pathlib import Path

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    lines = Path(settings["data"]).read_text(encoding="utf-8").splitlines()[:count]
    found = [json.loads(line) for line in lines]
    data = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in found])
    targets: list[int] = []

    class Stopped(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if gate is not None and logs and "loss" in logs:
                gate.step(float(logs["loss"]), targets[state.global_step - 1])

    trainer = SFTTrainer(
        model=adapted(settings),
        args=SFTConfig(
            output_dir=settings["output"], use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
            learning_rate=settings["learning_rate"], lr_scheduler_type="constant",
            weight_decay=settings["weight_decay"], num_train_epochs=100, disable_tqdm=True,
            dataloader_pin_memory=False, eval_packing=settings.get("packing", False),
            per_device_eval_batch_size=count or 8, **{"gradient_checkpointing": False, **settings.get("trl", {})},
        ),
        train_dataset=data,
        eval_dataset=data if gate is None else None,
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
        callbacks=[Stopped()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(examples: Any) -> Any:
        batch = collate(examples)
        targets.append(int((batch["labels"][:, 1:] >= 0).sum()))  # the first token of a row is predicted from nothing
        return batch

    trainer.data_collator = counted
    return trainer, targets


def trl(settings: dict[str, Any], gate: Gate) -> None:
    """TRL's SFTTrainer on rows with a question and an answer."""
    trainer, _ = trainer_of(settings, None, gate)
    gate.facts = {"factors": str(next(p.dtype for p in trainer.model.parameters() if p.requires_grad)),
                  "attention": trainer.model.config._attn_implementation}  # fmt: skip
    trainer.train()


def trl_loss(settings: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """The loss of the first examples in one batch, and how many targets it has."""
    trainer, targets = trainer_of(settings, settings["examples"], None)
    found = trainer.evaluate()["eval_loss"]
    if len(targets) != 1:
        raise SystemExit(f"{len(targets)} batches: the mean of their means is not the mean over tokens")
    return {"loss": found, "targets": targets[0]}


WAYS = {
    "adapter": Way(PEFT, adapter),
    "gradients": Way(PEFT, gradients),
    "plain": Way(PEFT, plain),
    "trl": Way(TRL, trl),
    "trl loss": Way(TRL, trl_loss),
}

if __name__ == "__main__":
    serve(WAYS)
