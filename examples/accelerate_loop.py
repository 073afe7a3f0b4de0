"""Distil in a loop of your own: `accelerate launch examples/accelerate_loop.py CACHE STUDENT OUT [STEPS]` (processes on
CPUs by torchrun).

Interrupt it and run it again: the state is one integer, the step, for an epoch's order is computed from (seed, epoch).
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, SequentialSampler
from transformers import AutoModelForCausalLM

import sparsekd as skd

cache, student, out, *rest = sys.argv[1:]
steps, batch_size, saved_every = int(*rest or "100"), 8, 10
accelerator = Accelerator()
rows_a_step = batch_size * accelerator.num_processes

model = skd.attach_sparse_kd(AutoModelForCausalLM.from_pretrained(student))
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
data = skd.CacheDataset(cache, seed=0, multiple_of=rows_a_step)
batches = DataLoader(data, batch_size, sampler=SequentialSampler(data), collate_fn=skd.SparseKDCollator())
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

state, step = Path(out, "state"), 0
if state.exists():
    accelerator.load_state(state)
    step = int(Path(out, "step").read_text())
while step < steps:
    epoch, done = divmod(step, len(batches))
    batches.set_epoch(epoch)
    for batch in accelerator.skip_first_batches(batches, done):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        accelerator.print(f"step {step}: {loss.item():.3f}")
        if step % saved_every == 0 or step == steps:
            accelerator.save_state(state)
            if accelerator.is_main_process:
                Path(out, "step").write_text(str(step))
        if step == steps:
            break
accelerator.unwrap_model(model).save_pretrained(out, is_main_process=accelerator.is_main_process)
