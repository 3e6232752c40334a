"""Estimators of a direction: theorems on planted and random activations."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import PredefinedSplit

from refusal_lens.directions.covariance import WithinClassCovariance
from refusal_lens.directions.estimators import (
    logistic_probe,
    mean_difference,
    paired_principal_component,
    whitened_mean_difference,
)
from refusal_lens.directions.similarity import cosine_similarity
from refusal_lens.errors import InputError

ESTIMATORS = [
    mean_difference,
    whitened_mean_difference,
    paired_principal_component,
    logistic_probe,
]


def draw(n=40, n_layers=3, d_model=12, *, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, d_model)
    rows = torch.randn(n, n_layers, d_model, generator=generator, dtype=torch.float64) * spread
    return rows + shift


def planted(n=400, seed=0):
    axis = torch.nn.functional.normalize(
        torch.randn(3, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64), dim=-1
    )
    noise = torch.Generator().manual_seed(seed)
    target = torch.randn(n, 3, 12, generator=noise, dtype=torch.float64) + 3 * axis
    baseline = torch.randn(n, 3, 12, generator=noise, dtype=torch.float64)
    return axis, target, baseline


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_every_estimator_recovers_a_planted_direction_pointing_from_baseline_to_target(estimate):
    axis, target, baseline = planted()
    assert (cosine_similarity(estimate(target, baseline), axis) > 0.95).all()
    # The control: with nothing planted there is nothing to recover.
    assert (cosine_similarity(estimate(target - 3 * axis, baseline), axis).abs() < 0.8).all()


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_swapping_target_and_baseline_turns_the_direction_round(estimate):
    target, baseline = draw(seed=1, shift=1.0), draw(seed=2)
    there, back = estimate(target, baseline), estimate(baseline, target)
    torch.testing.assert_close(there, -back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_rotating_the_activations_rotates_the_direction(estimate):
    target, baseline = draw(seed=1, shift=1.0), draw(seed=2)
    rotation, _ = torch.linalg.qr(draw(12, 1, 12, seed=5)[:, 0])
    torch.testing.assert_close(
        estimate(target @ rotation, baseline @ rotation),
        estimate(target, baseline) @ rotation,
        rtol=1e-6,
        atol=1e-6,
    )


def test_mean_difference_averages_in_float64_whatever_comes_in():
    big = torch.full((2000, 1, 1), 256.0, dtype=torch.bfloat16)
    big[0] = 1.0
    exact = (255 * 1 - 0) / 2000
    difference = mean_difference(big, torch.full((3, 1, 1), 256.0, dtype=torch.bfloat16))
    assert difference.dtype == torch.float32
    assert difference.item() == pytest.approx(-exact, rel=1e-6)
    # The control: a bfloat16 mean can't see that one row.
    assert (big.mean(0) - 256).item() != pytest.approx(-exact, rel=1e-2)


def test_mean_difference_equals_numpy():
    target, baseline = draw(17), draw(23, seed=4)
    expected = np.mean(target.numpy(), 0) - np.mean(baseline.numpy(), 0)
    np.testing.assert_allclose(mean_difference(target, baseline).numpy(), expected, rtol=1e-12)


def test_within_class_covariance_is_scikit_learns_ledoit_wolf():
    target, baseline = draw(30, seed=1, shift=2.0), draw(20, seed=2)
    covariance = WithinClassCovariance.of(target, baseline)
    vectors = draw(1, seed=7)[0]
    for layer in range(3):
        rows = torch.cat([t[:, layer] - t[:, layer].mean(0) for t in (target, baseline)]).numpy()
        expected, shrinkage = ledoit_wolf(rows, assume_centered=True)
        assert covariance.shrinkage[layer].item() == pytest.approx(shrinkage, rel=1e-9)
        np.testing.assert_allclose(
            covariance.solve(vectors)[layer].numpy(),
            np.linalg.solve(expected, vectors[layer].numpy()),
            rtol=1e-8,
        )
        np.testing.assert_allclose(covariance.variance[layer].numpy(), (rows**2).mean(0))


def test_whitened_mean_difference_is_scikit_learns_discriminant():
    target, baseline = draw(30, seed=1, shift=1.0), draw(30, seed=2)
    result = whitened_mean_difference(target, baseline)
    for layer in range(3):
        rows = torch.cat([target[:, layer], baseline[:, layer]]).numpy()
        label = np.repeat([1, 0], 30)
        within = torch.cat([t[:, layer] - t[:, layer].mean(0) for t in (target, baseline)]).numpy()
        covariance, _ = ledoit_wolf(within, assume_centered=True)

        class Shrunk:
            def fit(self, rows, covariance=covariance):
                self.covariance_ = covariance
                return self

        theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk())
        np.testing.assert_allclose(
            result[layer].numpy(), theirs.fit(rows, label).coef_[0], rtol=1e-8
        )


def test_logistic_probe_is_scikit_learns_at_one_penalty():
    target, baseline = draw(30, seed=1, shift=0.5), draw(40, seed=2)
    result = logistic_probe(target, baseline, penalties=(0.1,))
    for layer in range(3):
        rows = torch.cat([target[:, layer], baseline[:, layer]])
        scale = (rows - rows.mean(0)).square().sum(-1).mean().item()
        # Theirs is C * sum(loss) + |w|^2 / 2.
        theirs = LogisticRegression(C=1 / (0.1 * 70 * scale), tol=1e-10, max_iter=10_000)
        theirs.fit(rows.numpy() - rows.mean(0).numpy(), np.repeat([1, 0], [30, 40]))
        np.testing.assert_allclose(result[layer].numpy(), theirs.coef_[0], rtol=1e-4)


def test_logistic_probe_is_scikit_learns_cross_validation_on_full_rows():
    # More dimensions than prompts: the probe fits in the span of the rows, scikit-learn outside too.
    target, baseline = (draw(n, 2, 90, seed=n, shift=0.01 * n) for n in (24, 31))
    penalties = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    probe = logistic_probe(target, baseline, penalties=penalties, folds=4)
    fold = np.concatenate([np.arange(24) % 4, np.arange(31) % 4])
    for layer in range(2):
        rows = torch.cat([target[:, layer], baseline[:, layer]]).numpy()
        scale = np.sqrt(((rows - rows.mean(0)) ** 2).sum(-1).mean())
        theirs = LogisticRegressionCV(
            Cs=[1 / (penalty * len(rows)) for penalty in penalties],
            cv=PredefinedSplit(fold),
            scoring="neg_log_loss",
            tol=1e-10,
            max_iter=10_000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        ).fit((rows - rows.mean(0)) / scale, np.repeat([1, 0], [24, 31]))
        np.testing.assert_allclose(probe[layer].numpy(), theirs.coef_[0] / scale, atol=1e-7)


def test_logistic_probe_stays_finite_where_the_classes_separate_perfectly():
    target, baseline = draw(30, seed=1, shift=50.0), draw(30, seed=2)
    probe = logistic_probe(target, baseline)
    assert probe.isfinite().all()
    projection = torch.einsum("nld,ld->nl", torch.cat([target, baseline]), probe)
    assert (projection[:30].amin(0) > projection[30:].amax(0)).all()


def test_paired_principal_component_is_a_unit_vector_and_numpys_leading_one():
    target, baseline = draw(seed=1, shift=0.7), draw(seed=2)
    result = paired_principal_component(target, baseline)
    for layer in range(3):
        _, _, right = np.linalg.svd((target - baseline)[:, layer].numpy())
        assert abs(right[0] @ result[layer].numpy()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_a_non_finite_activation_is_named_by_set_row_and_layer(estimate):
    target, baseline = draw(seed=1), draw(seed=2)
    baseline[5, 2, 0] = torch.nan
    with pytest.raises(InputError, match=r"row 5 of the baseline set .* layer 2"):
        estimate(target, baseline)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_an_empty_set_is_an_error(estimate):
    with pytest.raises(InputError, match="target set is empty"):
        estimate(draw(0), draw(0))


def test_a_probe_with_fewer_rows_than_folds_and_a_covariance_of_one_row_are_errors():
    with pytest.raises(InputError, match="fewer than the 5 folds"):
        logistic_probe(draw(3), draw(30))
    with pytest.raises(InputError, match="at least 2"):
        whitened_mean_difference(draw(1), draw(30))


def test_layers_without_variation_give_nan_and_leave_the_others_alone():
    target, baseline = draw(seed=1), draw(seed=2)
    target[:, 1], baseline[:, 1] = 2.0, 2.0
    for estimate in (whitened_mean_difference, logistic_probe):
        direction = estimate(target, baseline)
        assert direction[1].isnan().all()
        assert direction[[0, 2]].isfinite().all()
