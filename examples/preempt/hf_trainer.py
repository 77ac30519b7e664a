"""Hugging Face's Trainer that can be preempted: one callback, and where to resume from.

python hf_trainer.py [--steps N] [--every N]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from llmops import preempt

RUN = os.environ.get("LLMOPS_RUN_URL", "run")  # the same folder in every attempt, and on every node


class Preempt(TrainerCallback):
    """Saves and stops when the job is asked to, and tells of every checkpoint."""

    stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        preempt.beat(state.global_step)
        stop = torch.tensor(float(preempt.should_stop()), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)  # all ranks stop after the same step
        if stop:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()  # every rank has saved its part
        preempt.committed(state.global_step, f"{args.output_dir}/checkpoint-{state.global_step}")


def main(steps: int, every: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(64, (256, 16))]
    arguments = TrainingArguments(
        output_dir=f"{RUN}/hf",
        max_steps=steps,
        save_steps=every,
        per_device_train_batch_size=4,
        ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        use_cpu=True,  # drop these two lines where there are GPUs
        disable_tqdm=True,
        report_to=[],
    )
    callback = Preempt()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
    start = preempt.resume_from()
    trainer.train(resume_from_checkpoint=start.path if start else None)
    if callback.stopped and trainer.state.global_step < steps:
        preempt.exit_stopped()
    if trainer.is_world_process_zero():
        print(f"done at {steps}: {sum(weight.abs().sum().item() for weight in model.parameters()):.15f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between two saves")
    main(**vars(parser.parse_args()))
