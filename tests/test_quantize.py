"""Codes of appendix D.1: decoded values by hand, and the paper's order of them on a real teacher."""

from __future__ import annotations

import numpy as np
import pytest

from sparsekd.quantize import CODES, divergence, linear, log_16, log_ratio, measure, quantisation_table, ratio


def test_linear_reads_the_middle_of_an_interval():
    """2 bits: quarters; 0.3 lies in [1/4, 1/2), 1.0 in the last, 0.01 in the first."""
    np.testing.assert_array_equal(linear(np.array([[1.0, 0.3, 0.01]]), bits=2), [[0.875, 0.375, 0.125]])


def test_ratio_follows_what_was_decoded():
    """2 bits: thirds. 0.7 -> 2/3; 0.3 / (2/3) = 0.45 -> 1/3 of 2/3; 0.01 / (2/9) = 0.045 -> the smallest step."""
    found = ratio(np.array([[0.7, 0.3, 0.01]]), bits=2)
    np.testing.assert_allclose(found, [[2 / 3, 2 / 9, 2 / 27]])


def test_log_ratio_is_exact_for_powers_of_two():
    """One octave is 1024 units, 32 squared: 1/2, 1/4, 1/8 come back as they are."""
    p = np.array([[0.5, 0.25, 0.125], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(log_ratio(p), p)
    np.testing.assert_array_equal(log_16(p), p)


def test_divergence_by_hand():
    """p = (1/2, 1/4), decoded (1/4, 1/4): 1/2 ln 2 - 1/2 + 1/4; exact 0; infinite where an entry got lost."""
    p = np.array([[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]])
    d = np.array([[0.25, 0.25], [0.5, 0.25], [0.5, 0.0]])
    np.testing.assert_allclose(divergence(p, d), [0.5 * np.log(2) - 0.25, 0, np.inf])


def test_measures_by_hand():
    """Errors 1/4 and 0 over two entries; padding (p = 0) is not judged, whatever it decodes to."""
    found = measure("t", "c", 7, np.array([[0.5, 0.25, 0.0]]), np.array([[0.25, 0.25, 0.9]]))
    assert (found.mean_error, found.max_error, found.mass_error) == (0.125, 0.25, 0.25)
    assert found.divergence == pytest.approx(0.5 * np.log(2) - 0.25)


@pytest.mark.parametrize("name", CODES)
def test_no_code_loses_an_entry_or_the_order(name):
    """Every p > 0 decodes above 0, and a larger p never decodes below a smaller one."""
    p = -np.sort(-np.random.default_rng(0).dirichlet(np.full(500, 0.05), size=50), axis=-1)[:, :20]
    p = np.maximum(p, 1e-12)
    found = CODES[name][0](p)
    assert (found > 0).all()
    assert (np.diff(found, axis=-1) <= 1e-9).all()


def test_a_table_wants_distributions():
    """Logits, or probabilities of no position, are refused."""
    for wrong in (np.zeros((0, 5)), np.ones((2, 5)), np.ones(5) / 5):
        with pytest.raises(ValueError, match="rows that sum to 1 are needed"):
            quantisation_table(wrong)


@pytest.fixture(scope="module")
def table(world):
    import torch

    from sparsekd import models
    from sparsekd.packed import RowsReader

    batch = RowsReader(world.rows).batch(range(32))
    with torch.no_grad():
        model = models.open_model(world.teacher, device="cpu")
        logits = model(input_ids=torch.from_numpy(batch.input_ids.astype(np.int64))).logits
    rows = quantisation_table(logits.flatten(0, 1).double().softmax(-1).numpy())
    return {(row.targets, row.code): row for row in rows}


@pytest.mark.parametrize("targets", ["top-12", "top-50"])
def test_the_papers_order_holds_on_a_real_teacher(table, targets):
    """Linear is worst; ratios lose some per cent of what it loses (less in the logarithm, which this teacher's steep
    steps need); 16 bits lose next to nothing."""
    lost = {code: table[targets, code].divergence for code in CODES}
    assert lost["linear"] > 10 * lost["ratio"]
    assert lost["linear"] > 100 * lost["log-ratio"] > 10_000 * lost["log"] > 0
    for code in ("ratio", "log-ratio"):
        assert table[targets, "linear"].mass_error > 5 * table[targets, code].mass_error
    assert table[targets, "linear"].max_error <= 1 / 256 + 1e-12


def test_counts_lose_nothing(table):
    """50 rounds in 6 bits, 200 in 20: every error is exactly 0."""
    for rounds, bits in ((50, 6), (200, 20)):
        row = table[f"random sampling {rounds}", "counts"]
        assert row.bits == bits
        assert (row.mean_error, row.max_error, row.mass_error) == (0, 0, 0)
        assert row.divergence == 0
