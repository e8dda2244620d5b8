"""Worker of the peers in `benchmarks.peers`: PyTorch with transformers, `adapters` or PEFT.

Each library is used as in its documentation, with its fast settings: scaled dot-product attention
where transformers has it, the fused AdamW of its trainer, and on a GPU TF32, as in JAX.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.contest import ADAPTER, WEIGHT_DECAY, Task, batch_of, cross_entropy
from benchmarks.turns import Work, serve

_ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "t5": "T5ForConditionalGeneration",
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def prepare(task: dict[str, Any]) -> Work:
    """Loads the backbone and adapter of a `Task`, and returns the work to run."""
    made = Task.from_json(task)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(made).to(device=device, dtype=getattr(torch, made.dtype))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = batch_of(made.size, model.config.vocab_size, made.shortest)
    tensors = {
        name: torch.tensor(batch[name], dtype=torch.long, device=device)
        for name in _INPUTS
        if name in batch
    }
    build = {"step": _step, "forward": _forward, "generate": _generate}[made.work]
    run, value = build(made, model, tensors)
    on_gpu = device.type == "cuda"
    return Work(
        run=run,
        wait=lambda result: torch.cuda.synchronize() if on_gpu else None,
        value=value,
        trained=trained,
        platform="gpu" if on_gpu else "cpu",
        device_peak=lambda: torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def _model(task: Task) -> Any:
    """Returns the model with its adapter, with trained parameters marked."""
    architecture = _ARCHITECTURES[task.size.family]
    model = getattr(transformers, architecture).from_pretrained(
        task.folder, trust_remote_code=False
    )
    if task.method == "full":
        return model
    if task.method == "lora":
        import peft  # noqa: PLC0415 - of two libraries a process loads the one that it measures

        model = peft.PeftModel.from_pretrained(model, str(task.adapter), is_trainable=True)
    else:
        import adapters  # noqa: PLC0415

        adapters.init(model)
        model.load_adapter(task.adapter, load_as=ADAPTER, use_safetensors=True, set_active=True)
        model.train_adapter(ADAPTER)
        if task.size.family != "t5":
            model.classifier.requires_grad_(True)
    return model


def _compiled(task: Task, model: Any) -> Callable[..., Any]:
    return torch.compile(model) if task.compiled else model


def _step(task: Task, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Returns a function that computes loss, gradients and update."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=task.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    call = _compiled(task, model)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run, float


def _forward(task: Task, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Returns a function that computes logits in evaluation mode, a T5's from the labels."""
    model.eval()
    call = _compiled(task, model)
    labels = batch["labels"].cpu().numpy()
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    if task.size.family == "t5":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])

    @torch.inference_mode()
    def run() -> Any:
        return call(**inputs).logits

    return run, lambda logits: cross_entropy(logits.float().cpu().numpy(), labels)


def _generate(task: Task, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """Returns a function that runs greedy search without early ends."""
    model.eval()
    model.generation_config.eos_token_id = None
    if task.compiled:
        model.forward = torch.compile(model.forward)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def run() -> Any:
        return model.generate(**prompt, max_new_tokens=task.generated, do_sample=False, num_beams=1)

    return run, lambda ids: np.asarray(ids.cpu()).tolist()


if __name__ == "__main__":
    serve({"prepare": prepare})
