"""Prompts in clusters: what the statistics leave out, move together and refuse to say."""

import itertools
import math

import numpy as np
import pytest
import torch

from refusal_lens.errors import InputError
from refusal_lens.uncertainty import Cause, Caution, Gram, cosine_statistics
from refusal_lens.uncertainty.clusters import MOST_ROWS, near_duplicates
from refusal_lens.uncertainty.effects import (
    IndependentSample,
    cosine_difference,
    mean_interval,
    ratio_interval,
    total_interval,
)

WIDTH = 30
TOPICS = (0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8)
FRAMES = tuple("abcdefghabcdefgh")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sets(n, seed=0, layers=2):
    rows = torch.randn(4, n, layers, WIDTH, generator=seeded(seed), dtype=torch.float64)
    rows[0, ..., 0] += 3
    rows[2, ..., :2] += 2
    return tuple(rows)


def statistics_of(four, *, paired=True, clusters=None):
    return cosine_statistics(
        *four,
        a_paired=paired,
        b_paired=paired,
        a_clusters=clusters,
        b_clusters=clusters,
        n_resamples=1000,
        generator=seeded(),
    )


def tensors(statistics):
    return {k: v for k, v in vars(statistics).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("crossed", [False, True])
def test_the_unbiased_norm_is_the_mean_product_of_pairs_that_share_no_cluster(crossed):
    target, baseline, *_ = four = sets(len(TOPICS))
    labels = [*zip(TOPICS, FRAMES, strict=True)] if crossed else TOPICS
    rows = (target - baseline)[:, 0].numpy()
    products = [
        rows[i] @ rows[j]
        for i, j in itertools.permutations(range(len(rows)), 2)
        if TOPICS[i] != TOPICS[j] and not (crossed and FRAMES[i] == FRAMES[j])
    ]
    gram = Gram.of(*four, a_paired=True, b_paired=True, a_clusters=labels, b_clusters=None)
    assert float(gram.unbiased_squared_norms[0][0]) == pytest.approx(np.mean(products))
    torch.testing.assert_close(
        gram.plain, Gram.of(*four, a_paired=True, b_paired=True).plain, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("paired", [True, False])
def test_prompts_said_three_times_say_as_much_as_once(paired):
    once = sets(12)
    thrice = tuple(side.repeat_interleave(3, 0) for side in once)
    labels = torch.arange(12).repeat_interleave(3)
    found = statistics_of(thrice, paired=paired, clusters=labels if paired else (labels, labels))
    expected, unaware = statistics_of(once, paired=paired), statistics_of(thrice, paired=paired)
    for name, value in tensors(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-5)
    width = expected.upper - expected.lower
    assert (unaware.upper - unaware.lower < 0.8 * width).all()  # the control


def test_clusters_of_one_prompt_change_nothing():
    four = sets(12)
    expected = tensors(statistics_of(four))
    for labels in (range(12), [(i, i) for i in range(12)]):
        found = tensors(statistics_of(four, clusters=labels))
        for name in ("unbiased", "lower", "upper"):
            close = {"rtol": 0, "atol": 0.05 if isinstance(labels, list) else 1e-12}
            torch.testing.assert_close(found[name], expected[name], **close)


def test_a_crossed_interval_is_at_least_as_wide_as_either_way_s():
    four = sets(len(TOPICS))
    ways = (TOPICS, FRAMES, [*zip(TOPICS, FRAMES, strict=True)])
    *one_way, both = (statistics_of(four, clusters=way) for way in ways)
    for way in one_way:
        assert (both.upper - both.lower > 0.9 * (way.upper - way.lower)).all()
        assert (both.p_value > way.p_value - 0.02).all()


def test_more_prompts_than_rows_are_merged_and_keep_direction_and_interval():
    four = sets(3 * MOST_ROWS, layers=1)
    merged = Gram.of(*four, a_paired=True, b_paired=True)
    assert merged.aa.shape[-1] == MOST_ROWS
    a, b = four[0].mean(0) - four[1].mean(0), four[2].mean(0) - four[3].mean(0)
    torch.testing.assert_close(merged.plain, torch.cosine_similarity(a, b, dim=-1))
    found, fewer = statistics_of(four), statistics_of(tuple(side[:MOST_ROWS] for side in four))
    ratio = float((found.upper - found.lower) / (fewer.upper - fewer.lower))
    assert ratio == pytest.approx(1 / math.sqrt(3), rel=0.1)


def test_too_few_clusters_are_a_reason_and_no_number():
    found = statistics_of(sets(15), clusters=[i // 5 for i in range(15)])
    assert {reason.cause for reason in found.reasons} == {Cause.TOO_FEW_CLUSTERS}
    assert found.unbiased.isnan().all()
    assert found.p_value.isnan().all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (range(5), "5,. labels for .15,. prompts"),
        ([(i, i, i) for i in range(15)], "more than two parts"),
        ([(0, 1), *range(14)], "several or more .* one label"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    with pytest.raises(InputError, match=message):
        statistics_of(sets(15), clusters=labels)


def clustered_values(seed, ways):
    """Draws of 48 values whose errors are shared by topic (8) and, with two ways, by frame (6)."""
    g = seeded(seed)
    topic, frame = torch.arange(48) // 6, torch.arange(48) % 6
    values = torch.randn(400, 48, generator=g) + 2 * torch.randn(400, 8, generator=g)[:, topic]
    if ways == 2:
        values += 4 * torch.randn(400, 6, generator=g)[:, frame]
    labels = [*zip(topic.tolist(), frame.tolist(), strict=True)] if ways == 2 else topic
    return values, labels, topic


@pytest.mark.parametrize("ways", [1, 2])
def test_intervals_of_means_and_ratios_cover_in_clusters(ways):
    values, labels, topic = clustered_values(0, ways)
    other = 20 + clustered_values(1, ways)[0]
    mean = mean_interval(values, clusters=labels)
    ratio = ratio_interval([IndependentSample(values + other / 2, other)], clusters=[labels])
    unaware = mean_interval(values, clusters=topic if ways == 2 else None)

    def coverage(found, true):
        return float(((found.lower <= true) & (true <= found.upper)).double().mean())

    assert 0.92 <= coverage(mean, 0) <= 0.98
    assert 0.92 <= coverage(ratio, 0.5) <= 0.98
    assert coverage(unaware, 0) < 0.8  # the control


def test_samples_with_and_without_clusters_add_up():
    draws, labels, _ = clustered_values(0, 2)
    values = draws[0]
    single = torch.randn(30, generator=seeded(1))
    both = total_interval([values, single], clusters=[labels, None])
    assert float(both.value) == pytest.approx(float(values.mean() + single.mean()), abs=1e-6)
    assert both.upper - both.value > mean_interval(values, clusters=labels).upper - values.mean()


def test_a_difference_of_cosines_is_less_sure_if_prompts_are_clustered():
    before, after = sets(24), sets(24, seed=1)
    labels = [i // 2 for i in range(24)]

    def moved(clusters):
        options = {"a_clusters": clusters, "b_clusters": clusters}
        twice = [[side.repeat_interleave(2, 0)[:24] for side in four] for four in (before, after)]
        return cosine_difference(
            *(Gram.of(*four, a_paired=True, b_paired=True, **options) for four in twice)
        )

    clustered, unaware = moved(labels), moved(None)
    torch.testing.assert_close(clustered.value, unaware.value)
    assert (clustered.upper - clustered.lower > 1.3 * (unaware.upper - unaware.lower)).all()


def test_near_duplicates_are_found_by_rare_words_and_not_by_their_frame():
    prompts = [
        f"How do I {verb} a {noun} ?" for verb, noun in zip("VWVWVWVW", "ABCDEFGH", strict=True)
    ]
    assert len({*near_duplicates([p.split() for p in prompts])}) == len(prompts)
    prompts += [
        "How do I paint a tall green wooden fence ?",
        "How do I paint my tall green wooden fence ?",
    ]
    labels = near_duplicates([p.split() for p in prompts])
    assert labels[-1] == labels[-2]
    assert len({*labels}) == len(prompts) - 1


def cautions_of(change):
    rows = torch.randn(2, 24, 1, 200, generator=seeded(), dtype=torch.float64)
    signal = torch.zeros(2, 1, 1, 200, dtype=torch.float64)
    signal[0, ..., 0], signal[1, ..., 0], signal[1, ..., 1] = 9, 8, 4
    strength = torch.ones(2, 24, 1, 1, dtype=torch.float64)
    change(rows, strength)
    a, b = rows + strength * signal
    baseline = torch.zeros_like(a) + torch.arange(24)[:, None, None]
    return statistics_of((a + baseline, baseline, b + baseline, baseline)).cautions[0]


def test_each_caution_is_given_where_it_is_due_and_not_elsewhere():
    def nothing(rows, strength):
        pass

    def outlier(rows, strength):
        rows[1, 3] *= 10

    def half_without_signal(rows, strength):
        strength[:, ::2] *= 0
        strength[:, 1::2] *= 2

    def shared_axis(rows, strength):
        rows[..., 5] *= 20

    assert cautions_of(nothing) == ()
    assert cautions_of(outlier) == (Caution.OUTLIERS,)
    assert cautions_of(half_without_signal) == (Caution.UNEVEN_STRENGTH,)
    assert cautions_of(shared_axis) == (Caution.SHARED_NOISE,)


def test_a_signal_in_half_of_the_prompts_has_an_interval_and_a_caution():
    known, covered = [], []
    for seed in range(2):
        rows = torch.randn(4, 24, 50, 200, generator=seeded(seed), dtype=torch.float64)
        strength = 12 * (torch.randn(2, 24, 50, generator=seeded(100 + seed)) > 0).double()
        rows[0, ..., 0] += 2 * strength[0]
        rows[2, ..., 0] += 2 * 0.9 * strength[1]
        rows[2, ..., 1] += 2 * math.sqrt(1 - 0.9**2) * strength[1]
        found = statistics_of(tuple(rows))
        known.append(found.unbiased.isfinite())
        covered.append((found.lower <= 0.9) & (found.upper >= 0.9))
        warned = [Caution.UNEVEN_STRENGTH in cautions for cautions in found.cautions]
        assert np.mean(warned) > 0.9
    known, covered = torch.cat(known), torch.cat(covered)
    assert known.double().mean() > 0.95
    assert covered[known].double().mean() > 0.75  # not 0.95: hence the caution


def test_the_band_of_a_single_layer_is_its_interval():
    found = statistics_of(sets(24, layers=1))
    torch.testing.assert_close(found.band_lower, found.lower)
    torch.testing.assert_close(found.band_upper, found.upper)
