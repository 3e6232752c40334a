"""How sure a cosine is: every quantity against a slow, independent one, and what it promises."""

import importlib.util
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from refusal_lens.errors import InputError
from refusal_lens.uncertainty import Cause, Gram, Unmeasured, cosine_statistics
from refusal_lens.uncertainty.cosine import norm_undetected, split_half_reliability, unbiased_cosine
from refusal_lens.uncertainty.effects import (
    IndependentSample,
    auroc_interval,
    mean_interval,
    ratio_interval,
    total_interval,
)
from refusal_lens.uncertainty.gram import noise_products, unbiased_squared_norm
from refusal_lens.uncertainty.intervals import LEAST_SHARE, Noise
from refusal_lens.uncertainty.permutation import WIDENING, permutation_null

LAYERS, WIDTH = 2, 30
EIGHT = (torch.full((8,), 1 / 8, dtype=torch.float64),)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sets(n=12, seed=0, layers=LAYERS, width=WIDTH, cosine=0.5, signal=1.0):
    """Four sets whose true directions have a known cosine: along axis 0, and between 0 and 1."""
    rows = torch.randn(4, n, layers, width, generator=seeded(seed), dtype=torch.float64)
    rows[0, ..., 0] += signal * math.sqrt(width)
    rows[2, ..., 0] += signal * math.sqrt(width) * cosine
    rows[2, ..., 1] += signal * math.sqrt(width) * math.sqrt(1 - cosine**2)
    return tuple(rows)


def gram_of(four, paired=True):
    return Gram.of(*four, a_paired=paired, b_paired=paired)


def noise_of(four):
    gram = gram_of(four)
    return Noise.of(gram, gram.unbiased_squared_norms)


def statistics_of(four, *, paired=True, n_resamples=1000, seed=0):
    return cosine_statistics(
        *four, a_paired=paired, b_paired=paired, n_resamples=n_resamples, generator=seeded(seed)
    )


def test_the_unbiased_norm_of_pairs_is_the_mean_product_of_two_different_pairs():
    target, baseline, *_ = four = sets()
    rows = (target - baseline)[:, 0].numpy()
    products = [rows[i] @ rows[j] for i, j in itertools.permutations(range(len(rows)), 2)]
    gram = gram_of(four)
    found = unbiased_squared_norm(gram.aa, gram.groups_a)[0]
    assert float(found) == pytest.approx(np.mean(products))


def test_the_unbiased_norm_without_pairs_leaves_out_each_prompt_with_itself():
    target, baseline, *_ = four = sets()
    t, b = target[:, 0].numpy(), baseline[:, 0].numpy()
    within = [
        np.mean([side[i] @ side[j] for i, j in itertools.permutations(range(len(side)), 2)])
        for side in (t, b)
    ]
    expected = within[0] + within[1] - 2 * t.mean(0) @ b.mean(0)
    gram = gram_of(four, paired=False)
    found = unbiased_squared_norm(gram.aa, gram.groups_a)[0]
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("paired", [True, False])
def test_the_plain_cosine_and_the_inner_product_are_those_of_the_means(paired):
    four = sets()
    a, b = four[0].mean(0) - four[1].mean(0), four[2].mean(0) - four[3].mean(0)
    gram = gram_of(four, paired=paired)
    torch.testing.assert_close(gram.inner, (a * b).sum(-1))
    torch.testing.assert_close(gram.plain, torch.cosine_similarity(a, b, dim=-1))


@pytest.mark.parametrize("paired", [True, False])
def test_the_unbiased_products_are_right_on_average_where_the_plain_ones_are_not(paired):
    true, plain, unbiased = float(WIDTH), [], []
    for seed in range(400):
        gram = gram_of(sets(n=6, seed=seed, layers=1), paired=paired)
        a = sets(n=6, seed=seed, layers=1)
        plain.append(float((a[0].mean(0) - a[1].mean(0)).square().sum()))
        unbiased.append(float(unbiased_squared_norm(gram.aa, gram.groups_a)))
    error = np.std(unbiased) / 20
    assert abs(np.mean(unbiased) - true) < 3 * error
    assert np.mean(plain) > true + 3 * error  # the control: noise adds to the plain norm


def test_the_noise_s_quadratic_part_is_estimated_without_bias():
    found, squared = [], []
    for seed in range(600):
        rows = torch.randn(8, 1, WIDTH, generator=seeded(seed), dtype=torch.float64)
        gram = (rows[:, 0] @ rows[:, 0].T)[None]
        found.append(2 * float(noise_products(gram, EIGHT).square().sum()))
        squared.append(float(unbiased_squared_norm(gram, EIGHT)))
    assert np.mean(found) == pytest.approx(np.var(squared), rel=0.15)


@pytest.mark.parametrize("paired", [True, False])
def test_split_halves_are_those_of_the_vectors(paired):
    four = sets(n=10)
    gram = gram_of(four, paired=paired)
    found = split_half_reliability(gram.aa, gram.groups_a, n_splits=400, generator=seeded())
    rng = np.random.default_rng(1)
    target, baseline = (side[:, 0].numpy() for side in four[:2])
    cosines = []
    for _ in range(2000):
        order = rng.permutation(10)
        other = order if paired else rng.permutation(10)
        a = target[order[:5]].mean(0) - baseline[other[:5]].mean(0)
        b = target[order[5:]].mean(0) - baseline[other[5:]].mean(0)
        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    half = np.mean(cosines)
    assert float(found[0]) == pytest.approx(2 * half / (1 + half), abs=0.02)


def test_the_p_value_counts_relabellings_that_reach_further():
    four = sets(n=7, signal=0.4)
    gram = gram_of(four)
    null = permutation_null(gram, n_resamples=4000, confidence=0.95, generator=seeded())
    a = (four[0] - four[1])[:, 0]
    b = (four[2] - four[3])[:, 0]
    direction = b.mean(0)

    def statistic(signs):
        # The inner product over its own jackknife error, less the part counted twice.
        rows = a * torch.tensor(signs, dtype=torch.float64)[:, None]
        n = len(rows)

        def variance(values):
            return values.var() / n

        along, back = rows @ direction, b @ rows.mean(0)
        cross = (rows - rows.mean(0)) @ (b - b.mean(0)).T
        bilinear = cross.square().sum() / (n * (n - 1)) ** 2
        jackknife = variance(along) + variance(back)
        return float(
            along.mean()
            / (jackknife - bilinear).maximum(LEAST_SHARE * jackknife).clamp_min(0).sqrt()
        )

    every = [abs(statistic(signs)) for signs in itertools.product((1.0, -1.0), repeat=7)]
    share = np.mean([WIDENING * value >= every[0] * (1 - 1e-5) for value in every])
    plain = np.mean([value >= every[0] * (1 - 1e-5) for value in every])
    assert share > plain + 0.03
    assert float(null.p_value[0]) == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("paired", [True, False])
def test_nothing_changes_when_the_space_is_turned_scaled_or_moved(paired):
    four = sets()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=seeded(9), dtype=torch.float64)).Q
    first = statistics_of(four, paired=paired)
    for changed in (
        tuple(side @ turn for side in four),
        tuple(1000 * side for side in four),
        tuple(side + 5 for side in four),
    ):
        second = statistics_of(changed, paired=paired)
        for name in (
            "plain",
            "unbiased",
            "lower",
            "upper",
            "band_lower",
            "p_value",
            "reliability_a",
        ):
            torch.testing.assert_close(
                getattr(second, name), getattr(first, name), atol=2e-3, rtol=2e-3
            )


def test_the_same_generator_gives_the_same_numbers_and_another_others():
    four = sets()
    one, same, other = (statistics_of(four, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.lower, same.lower)
    assert torch.equal(one.p_value, same.p_value)
    assert not torch.equal(one.lower, other.lower)


def test_the_band_holds_the_interval_and_the_interval_the_estimate():
    found = statistics_of(sets(n=24, layers=6))
    assert (found.lower < found.unbiased).all()
    assert (found.unbiased < found.upper).all()
    assert (found.band_lower <= found.lower).all()
    assert (found.band_upper >= found.upper).all()


def benchmark_named(name):
    """A committed simulation, loaded as the script that it is."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_a_small_simulation_covers_and_the_plain_cosine_would_not():
    benchmark = benchmark_named("statistics_coverage")
    rows = benchmark.simulate(
        benchmark.Setting(64, 0),
        draws=100,
        cosines=(0.0, 0.9),
        reliabilities=(0.6,),
        resamples=500,
    )
    by_cosine = {row.cosine: row for row in rows}
    for row in rows:
        assert row.coverage >= 0.88  # 95 % less three standard errors of 100 draws
        assert abs(row.bias) < 0.05
        assert row.width_ratio < 1.6
    assert by_cosine[0.0].rejected <= 0.12
    assert by_cosine[0.9].plain < 0.7  # the control: noise hides a true 0.9


def test_the_band_holds_the_curve_of_a_high_cosine():
    whole, _ = benchmark_named("statistics_designs").band(24, 0.9, 0.9, draws=60, seed=1000)
    assert whole >= 0.93  # 0.88 where the far tail has all degrees of freedom


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_too_few_prompts_are_a_reason_and_no_number(n, paired):
    found = statistics_of(tuple(side[:n] for side in sets()), paired=paired)
    assert found.reasons == (Unmeasured(Cause.TOO_FEW_PROMPTS),) * LAYERS
    for name in ("unbiased", "lower", "upper", "band_lower", "band_upper", "p_value"):
        assert getattr(found, name).isnan().all()


def test_a_class_that_does_not_vary_is_a_reason_and_no_number():
    four = list(sets())
    four[1] = four[1].clone()
    four[1][:, 0] = four[1][:1, 0]
    found = statistics_of(tuple(four))
    assert found.reasons[0] == Unmeasured(Cause.CONSTANT, ("a",))
    assert found.unbiased[0].isnan()
    assert found.reasons[1] is None
    assert found.unbiased[1].isfinite()


def test_noise_alone_is_a_reason_and_no_number():
    rows = torch.randn(4, 40, LAYERS, 2000, generator=seeded(3))
    found = statistics_of(tuple(rows))
    assert found.unbiased.isnan().all()
    assert {reason.cause for reason in found.reasons} == {Cause.WEAK}
    # The control: with a signal there is a number.
    rows[0, ..., 0] += 20
    rows[2, ..., 0] += 20
    assert statistics_of(tuple(rows)).unbiased.isfinite().all()


@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named_by_set_row_and_layer(side, value):
    four = [rows.clone() for rows in sets()]
    four[side][3, 1, 4] = value
    which = f"{('target', 'baseline')[side % 2]} set of contrast {'ab'[side // 2]}"
    with pytest.raises(InputError, match=f"row 3 of the {which} holds .* at layer 1"):
        statistics_of(tuple(four))


def test_pairs_must_be_complete_and_resamples_enough():
    four = sets()
    with pytest.raises(InputError, match="complete the pairs"):
        statistics_of((four[0][:5], *four[1:]))
    with pytest.raises(InputError, match="too few beyond the ends"):
        statistics_of(four, n_resamples=100)


def test_the_estimate_exceeds_one_rather_than_being_clipped():
    noise = noise_of(sets(n=16, cosine=1.0, seed=4))
    inflated = replace(noise, inner=noise.inner * 1.5)
    assert (unbiased_cosine([inflated]) > 1).any()


def test_noise_alone_is_mistaken_for_a_norm_no_more_often_than_promised():
    undetected = []
    for seed in range(300):
        rows = torch.randn(12, WIDTH, generator=seeded(seed), dtype=torch.float64)
        weights = torch.full((12,), 1 / 12, dtype=torch.float64)
        undetected.append(bool(norm_undetected((rows @ rows.T)[None], (weights,), 0.95)))
    assert np.mean(undetected) > 0.93


def test_resamples_start_from_errors_that_would_make_the_residual_zero():
    noise = noise_of(sets(n=40, signal=2.0))
    theta = noise.inner - 0.1
    c = noise.linear - theta[:, None] * noise.linear_norm
    rows = noise.aa.shape[1]
    matrix = torch.zeros(LAYERS, 2 * rows, 2 * rows, dtype=torch.float64)
    matrix[:, :rows, :rows] = -theta[:, None, None] * noise.aa
    matrix[:, rows:, rows:] = -theta[:, None, None] * noise.bb
    matrix[:, :rows, rows:], matrix[:, rows:, :rows] = noise.ab, noise.ab.mT
    errors = -(noise.inner - theta)[:, None] * c / c.square().sum(-1, keepdim=True)
    torch.testing.assert_close((errors * c).sum(-1), -(noise.inner - theta))
    moved = c + (matrix @ errors[..., None])[..., 0]
    found, quadratic = noise.under_hypothesis(theta)
    torch.testing.assert_close(torch.cosine_similarity(found, moved), torch.ones(2).double())
    torch.testing.assert_close(quadratic, matrix.square().sum((-2, -1)) / 2)


def test_intervals_of_means_and_differences_are_students():
    values = torch.randn(3, 20, generator=seeded())
    found = mean_interval(values)
    half = 2.093024 * values.double().std(-1) / math.sqrt(20)
    torch.testing.assert_close(found.upper - found.value, half, rtol=1e-5, atol=0)
    both = total_interval([values, -values.flip(-1)])
    torch.testing.assert_close(both.value, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_ratio_s_interval_covers_where_dividing_the_ends_would_not():
    covered = []
    for seed in range(400):
        x = torch.randn(20, 2, generator=seeded(seed), dtype=torch.float64)
        bottom = 1 + 1.5 * x[:, 0]
        top = 0.5 * bottom + 0.3 * x[:, 1]
        found = ratio_interval([IndependentSample(top, bottom)])
        covered.append(bool(found.lower <= 0.5 <= found.upper))
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_ratio_over_what_may_be_nothing_has_no_end():
    noise = torch.randn(20, generator=seeded(1)).double()
    found = ratio_interval([IndependentSample(torch.ones(20).double(), noise)])
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    unknown = ratio_interval([IndependentSample(noise * math.nan, noise + 5)])
    assert all(end.isnan() for end in unknown)


def test_the_area_under_the_curve_is_scikit_learns():
    target, baseline = torch.randn(2, 25, generator=seeded(2))
    found = auroc_interval(target + 0.7, baseline)
    labels = [1] * 25 + [0] * 25
    expected = roc_auc_score(labels, torch.cat([target + 0.7, baseline]).numpy())
    assert float(found.value) == pytest.approx(expected)
    assert found.lower < found.value < found.upper
    perfect = auroc_interval(target + 100, baseline)
    assert perfect.value == perfect.upper == 1
    assert 0.8 < perfect.lower < 1  # 25 prompts can't show more
