"""Students inside stock training code: the patched forward, the batches, the order of rows, what is refused."""

from __future__ import annotations

import pickle
import types

import numpy as np
import oracles
import pytest
import torch

import sparsekd as skd
from sparsekd import models
from sparsekd.errors import ModelError, RecipeError
from sparsekd.prefix_sets import PrefixSets

V, L, K = 60, 10, 4


def tiny(**changes):
    torch.manual_seed(0)
    shape = {"family": "tiny", "hidden_size": 16, "intermediate_size": 32, **changes}
    return models.new_student(shape, vocab_size=V, seq_len=L)


def batch(rows=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (rows, L), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, L, generator=generator) < 0.3, -100)
    kd_ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(rows * (L - 1))])
    weights = torch.rand(rows * (L - 1), K, generator=generator)
    weights /= weights.sum(-1, keepdim=True)
    return {
        "input_ids": ids,
        "labels": labels,
        "kd_ids": kd_ids.view(rows, L - 1, K),
        "kd_weights": weights.view(rows, L - 1, K),
    }


def test_forward_returns_the_loss_of_its_own_logits():
    """With targets, loss and every gradient equal `sparse_kl` on the model's own shifted logits."""
    model, reference, inputs = tiny(), tiny(), batch()
    skd.attach_sparse_kd(model, ce_weight=0.2)
    loss = model(**inputs).loss
    loss.backward()
    logits = reference(input_ids=inputs["input_ids"]).logits[:, :-1]
    targets = skd.SparseTargets(ids=inputs["kd_ids"], weights=inputs["kd_weights"])
    want = skd.sparse_kl(logits, targets, labels=inputs["labels"][:, 1:], ce_weight=0.2)
    want.backward()
    torch.testing.assert_close(loss, want)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_forward_takes_sets_of_tokens():
    """With `sets`, forward returns `sparse_ce(..., sets=...)` of the model's own logits, gradients included."""
    model, reference, inputs = tiny(), tiny(), batch()
    sets = PrefixSets(vocab_size=V, order=torch.arange(V), first=torch.arange(V - 5), last=torch.arange(5, V))
    inputs["kd_ids"][..., 1] += V
    skd.attach_sparse_kd(model, ce_weight=0.2, sets=sets)
    loss = model(**inputs, num_items_in_batch=7).loss
    loss.backward()
    logits = reference(input_ids=inputs["input_ids"]).logits[:, :-1]
    targets = skd.SparseTargets(ids=inputs["kd_ids"], weights=inputs["kd_weights"])
    words = {"labels": inputs["labels"][:, 1:], "ce_weight": 0.2, "num_items_in_batch": 7}
    want = skd.sparse_ce(logits, targets, sets=sets, **words)
    want.backward()
    torch.testing.assert_close(loss, want)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_num_items_in_batch_makes_accumulation_exact():
    """Two half batches with the whole count give the gradient of the whole batch."""
    inputs, whole, halves = batch(4), tiny(), tiny()
    skd.attach_sparse_kd(whole)
    skd.attach_sparse_kd(halves)
    items = (inputs["labels"][:, 1:] != -100).sum()
    whole(**inputs, num_items_in_batch=items).loss.backward()
    for part in (slice(0, 1), slice(1, 4)):
        halves(**{k: v[part] for k, v in inputs.items()}, num_items_in_batch=items).loss.backward()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=1e-5)


def test_without_targets_forward_is_what_it_was():
    """Labels alone give the model's own cross-entropy, ids alone its logits; generation works."""
    model, reference, inputs = tiny(), tiny(), batch()
    skd.attach_sparse_kd(model)
    plain = {k: inputs[k] for k in ("input_ids", "labels")}
    torch.testing.assert_close(model(**plain).loss, reference(**plain).loss)
    assert torch.equal(model(inputs["input_ids"]).logits, reference(inputs["input_ids"]).logits)
    out = model.generate(inputs["input_ids"][:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 7)


def test_full_kd_is_the_dense_loss_in_training_only():
    """The online baseline equals full_kl to the teacher's logits; in eval mode labels give cross-entropy."""
    model, reference, inputs = tiny(), tiny(), batch()
    torch.manual_seed(5)
    teacher = models.new_student("tiny", vocab_size=V, seq_len=L).eval()
    skd.attach_full_kd(model, teacher)
    model.train()
    plain = {k: inputs[k] for k in ("input_ids", "labels")}
    t = skd.SparseTargets(
        ids=torch.arange(V).expand(3 * (L - 1), V),
        weights=teacher(inputs["input_ids"]).logits[:, :-1].softmax(-1).flatten(0, 1).detach(),
    )
    labels = inputs["labels"][:, 1:].flatten()
    want = oracles.dense_loss(reference(inputs["input_ids"]).logits[:, :-1].flatten(0, 1), t, labels=labels)
    torch.testing.assert_close(model(**plain).loss, want.sum() / (labels != -100).sum())
    model.eval()
    torch.testing.assert_close(model(**plain).loss, reference(**plain).loss)
    assert not any("teacher" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", ["softcap", "logit_scale", "divided", "bias"])
def test_heads_with_a_form_of_their_own(family):
    """Soft-caps, multipliers, divisors and biases are re-applied: loss and gradients equal those of own logits."""
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GPTJConfig,
        GPTJForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None}

    def build():
        torch.manual_seed(0)
        if family == "softcap":
            return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.3))
        if family == "logit_scale":
            return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25))
        if family == "divided":
            return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0))
        model = GPTJForCausalLM(GPTJConfig(vocab_size=V, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32))
        torch.nn.init.normal_(model.lm_head.bias)
        return model

    model, reference, inputs = build(), build(), batch()
    model.eval()  # GPT-J's dropout
    reference.eval()
    skd.attach_sparse_kd(model)
    loss = model(**inputs).loss
    targets = skd.SparseTargets(ids=inputs["kd_ids"], weights=inputs["kd_weights"])
    want = skd.sparse_kl(reference(inputs["input_ids"]).logits[:, :-1], targets, labels=inputs["labels"][:, 1:])
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_an_unknown_form_of_head_is_refused():
    """A model whose logits are not those of its head's weights is refused before training."""

    class Strange(type(tiny())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.flip(-1)
            return out

    model = tiny()
    model.__class__ = Strange
    with pytest.raises(ModelError, match="do not reproduce the model's logits"):
        skd.attach_sparse_kd(model)
    with pytest.raises(ModelError, match=r"Linear is no model of transformers, .* give its hidden states"):
        skd.attach_sparse_kd(torch.nn.Linear(2, 2))


def test_peft():
    """LoRA on the body trains; LoRA on the head and prompt tuning are refused with the reason and the way out."""
    import peft

    inputs = batch()
    lora = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    skd.attach_sparse_kd(lora)
    loss = lora(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), skd.attach_sparse_kd(tiny())(**inputs).loss.detach())
    trained = [p.grad for p in lora.parameters() if p.requires_grad]
    assert trained
    assert any((g != 0).any() for g in trained)
    before = skd.attach_sparse_kd(tiny(tie_word_embeddings=False))
    after = peft.get_peft_model(before, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"LoRA on the output embedding .* modules_to_save"):
        after(**inputs)
    whole = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved = peft.get_peft_model(tiny(tie_word_embeddings=False), whole)
    skd.attach_sparse_kd(saved)
    saved(**inputs).loss.backward()
    assert any("lm_head" in n and p.grad is not None and p.grad.abs().sum() > 0 for n, p in saved.named_parameters())
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="virtual tokens"):
        skd.attach_sparse_kd(peft.get_peft_model(tiny(), config))


def test_experts_stay_balanced():
    """A mixture of experts whose config asks for its load-balancing loss gets it: with the text alone, its own loss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": L}
    losses, inputs = {}, batch()
    for asked in (True, False):

        def build(asked=asked):
            torch.manual_seed(0)
            config = MixtralConfig(**shape, **heads, output_router_logits=asked, router_aux_loss_coef=0.5)
            return MixtralForCausalLM(config)

        model = build()
        own = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        skd.attach_sparse_kd(model, ce_weight=1.0)
        losses[asked] = model(**inputs).loss
        torch.testing.assert_close(losses[asked], own)
        full = skd.attach_full_kd(build(), tiny(), ce_weight=1.0).train()
        torch.testing.assert_close(full(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss, own)
    assert losses[True] > losses[False] + 0.1


def other_forward(model):
    """What Liger's kernels and TRL's trainers do to a model when training begins."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return hidden @ self.lm_head.weight.T

    model.forward = types.MethodType(forward, model)


def test_a_forward_put_over_ours_is_refused():
    """Targets that the forward in force would leave out are refused, under PEFT too; batches without any pass."""
    import peft

    model, inputs = skd.attach_sparse_kd(tiny()), batch()
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    other_forward(model)
    for outer in (model, lora):
        with pytest.raises(ModelError, match=r"kd_ids, kd_weights came to LlamaModel: .*fused_linear_cross_entropy"):
            outer(**inputs)
    model(input_ids=inputs["input_ids"], labels=inputs["labels"])


def test_gradient_checkpointing_and_autocast_change_nothing_much():
    """Checkpointing gives the same gradients; bf16 autocast the same loss to bf16 precision."""
    inputs, plain, checkpointed = batch(), tiny(), tiny()
    skd.attach_sparse_kd(plain)
    skd.attach_sparse_kd(checkpointed)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        model.train()
        model(**inputs).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = plain(**inputs).loss
    torch.testing.assert_close(low, plain(**inputs).loss, rtol=0, atol=1e-4)
    assert not torch.equal(low, plain(**inputs).loss)


def test_targets_of_another_length_are_refused():
    """Targets that do not have one position for each token but the last never reach the loss."""
    model, inputs = skd.attach_sparse_kd(tiny()), batch()
    inputs["kd_ids"], inputs["kd_weights"] = inputs["kd_ids"][:, :-1], inputs["kd_weights"][:, :-1]
    with pytest.raises(ValueError, match=r"positions \(3, 8\), the batch needs \(3, 9\)"):
        model(**inputs)


def test_collated_rows(world):
    """Ids and targets of a batch are the rows', padded with weight 0; labels are -100 where unsupervised, and first."""
    with skd.CacheReader(world.cache) as reader:
        rows = [reader[i] for i in (3, 0, len(reader) - 1)]
        made = skd.SparseKDCollator()(rows)
        for index, row in enumerate(rows):
            assert np.array_equal(made["input_ids"][index].numpy(), row.input_ids)
            labels = made["labels"][index].numpy()
            target = row.supervised & (np.arange(len(labels)) > 0)
            assert (labels[target] == row.input_ids[target]).all()
            assert (labels[~target] == -100).all()
            ours = skd.SparseTargets(ids=made["kd_ids"][index], weights=made["kd_weights"][index]).densify(300)
            assert torch.equal(ours, skd.SparseTargets.of(row.targets).densify(300))
        assert "kd_ids" not in skd.SparseKDCollator(with_targets=False)(rows)


def test_the_order_of_rows_hangs_on_seed_and_epoch_alone(world):
    """Every epoch is another permutation of all rows; a copy in another process has the same one."""
    with skd.CacheReader(world.cache) as reader:
        data = skd.CacheDataset(reader, seed=3)
        first = [data.row_number(i) for i in range(len(data))]
        data.set_epoch(1)
        second = [data.row_number(i) for i in range(len(data))]
        assert sorted(first) == sorted(second) == list(range(len(reader)))
        assert first != second
        copy = pickle.loads(pickle.dumps(data))
        assert [copy.row_number(i) for i in range(len(data))] == second
        assert copy[0].index == second[0]
        assert skd.CacheDataset(reader, shuffle=False)[5].index == 5
        assert repr(data) == f"CacheDataset({len(data)} rows, seed=3, epoch=1, of {reader!r})"
        of_path = skd.CacheDataset(world.cache, seed=3)
        assert [row.index for row in of_path.__getitems__(range(9))] == first[:9]


def test_the_family_of_students():
    """300m and 3b have the paper's sizes (table 17); settings override a family; unknown ones are refused."""
    config = models.FAMILY["300m"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]) == (24, 1024, 2816)
    assert models.FAMILY["3b"] == {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
    }
    with torch.device("meta"):
        count = sum(p.numel() for p in models.new_student("300m", vocab_size=100_000, seq_len=1024).parameters())
    assert 2.5e8 < count < 4.5e8
    with pytest.raises(RecipeError, match="unknown student setting 'hidden'"):
        models.new_student({"family": "tiny", "hidden": 3}, vocab_size=V, seq_len=L)
    with pytest.raises(RecipeError, match="unknown student family 'huge'; there are tiny"):
        models.new_student({"family": "huge"}, vocab_size=V, seq_len=L)


@pytest.mark.parametrize("residual", ["renormalize", "smooth", "ghost", "label"])
def test_missing_mass_is_treated_inside_forward(residual):
    """With `residual`, forward returns `sparse_kl(..., residual=...)` of the model's own logits."""
    model, reference, inputs = tiny(), tiny(), batch()
    inputs["kd_weights"] = 0.6 * inputs["kd_weights"]
    loss = skd.attach_sparse_kd(model, residual=residual)(**inputs).loss
    targets = skd.SparseTargets(ids=inputs["kd_ids"], weights=inputs["kd_weights"])
    logits, labels = reference(inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
    torch.testing.assert_close(loss, skd.sparse_kl(logits, targets, labels=labels, residual=residual))
    assert abs(loss - skd.attach_sparse_kd(tiny())(**inputs).loss) > 1e-3


def test_hard_tokens_and_divergences_inside_forward():
    """hard_ratio weighs tokens as `hard_token_weights`; mse and the full divergences equal their functions."""
    from sparsekd.divergences import full_divergence, sparse_divergence
    from sparsekd.residuals import hard_token_weights

    inputs, reference = batch(), tiny()
    inputs["kd_ids"][..., 0] = inputs["input_ids"][:, 1:]
    logits, labels = reference(inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
    targets = skd.SparseTargets(ids=inputs["kd_ids"], weights=inputs["kd_weights"])
    factors = hard_token_weights(targets, labels, ratio=2.0)
    want = skd.sparse_kl(logits, targets, labels=labels, token_weights=factors)
    torch.testing.assert_close(skd.attach_sparse_kd(tiny(), hard_ratio=2.0)(**inputs).loss, want)
    want = sparse_divergence(logits, targets, "mse", labels=labels)
    torch.testing.assert_close(skd.attach_sparse_kd(tiny(), divergence="mse")(**inputs).loss, want)
    torch.manual_seed(5)
    teacher = models.new_student("tiny", vocab_size=V, seq_len=L)
    model = skd.attach_full_kd(tiny(), teacher, divergence="reverse_kl").train()
    want = full_divergence(logits, teacher(inputs["input_ids"]).logits[:, :-1], "reverse_kl", labels=labels)
    torch.testing.assert_close(model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss, want)
    with pytest.raises(ValueError, match="no meaning on sparse targets"):
        skd.attach_sparse_kd(tiny(), divergence="reverse_kl")


@pytest.mark.parametrize("divergence", ["forward_kl", "mse"])
def test_num_items_in_batch_divides_every_loss(divergence):
    """What Trainer hands on under accumulation: the sum over positions is divided by it, online and from a cache."""
    inputs, items = batch(), 1000
    kept = (inputs["labels"][:, 1:] != -100).sum()
    full = skd.attach_full_kd(tiny(), tiny(hidden_size=32).eval(), divergence=divergence).train()
    sparse = skd.attach_sparse_kd(tiny(), divergence=divergence)
    for model, given in ((full, {k: inputs[k] for k in ("input_ids", "labels")}), (sparse, inputs)):
        scaled = model(**given, num_items_in_batch=items).loss * items
        torch.testing.assert_close(scaled, model(**given).loss * kept)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ce_weight": 0.1}, "ce_weight=0.1 goes with divergence=forward_kl only, not with mse"),
        ({"residual": "ghost"}, "residual=ghost goes with"),
        ({"hard_ratio": 2.0}, "hard_ratio=2.0 goes with"),
    ],
)
def test_what_another_divergence_would_leave_out_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        skd.attach_sparse_kd(tiny(), divergence="mse", **settings)
    if "ce_weight" in settings:
        with pytest.raises(ValueError, match=words):
            skd.attach_full_kd(tiny(), tiny(), divergence="mse", **settings)
