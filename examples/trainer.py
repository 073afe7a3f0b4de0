"""Distil into a student of your own with a stock Trainer: `python examples/trainer.py CACHE STUDENT OUT`."""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparsekd as skd

cache, student, out = sys.argv[1:4]
model = skd.attach_sparse_kd(AutoModelForCausalLM.from_pretrained(student))
args = TrainingArguments(
    out, train_sampling_strategy="sequential", remove_unused_columns=False, max_steps=20, logging_steps=5
)
data = skd.CacheDataset(cache, seed=0)  # shuffled by (seed, epoch), not by the sampler
Trainer(model, args, train_dataset=data, data_collator=skd.SparseKDCollator()).train()
