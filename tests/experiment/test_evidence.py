"""The numbers of the evidence, from scores made by hand."""

import torch

from refusal_lens.experiment.causal import judged_layer, other_prompts
from refusal_lens.experiment.config import some_prompts
from refusal_lens.experiment.evidence import (
    Earlier,
    Evidence,
    Responses,
    compute_evidence,
    lowered_most,
)
from refusal_lens.experiment.verdict import Estimate
from refusal_lens.interventions import Effects
from refusal_lens.prompts.contrast import Contrast

N, RANDOM = 32, range(3, 23)
GEOMETRY = Evidence(5, N, 1.0, 1.0, Estimate(0.0, -0.1, 0.1))


def contrast(name):
    return Contrast(
        name, *(tuple(f"{name} {side} {i}" for i in range(N)) for side in "ab"), paired=True
    )


def found(**changed):
    """The evidence of a model that refuses harmful prompts; ablating refusal undoes it."""
    noise = torch.randn(5, N, generator=torch.Generator().manual_seed(0)) / 4
    refused, answered = 4 + noise[0], -6 + noise[1]
    # Random directions do nothing, and run on every third prompt.
    by_chance = torch.full((len(RANDOM), N), torch.nan)
    by_chance[:, ::3] = 0
    scores = {
        "harmful": torch.cat([torch.stack([refused, answered, refused]), refused + by_chance]),
        "harmless": answered.expand(3, -1),
        "negative": torch.cat([answered.expand(3, -1), answered + by_chance]),
        "neutral": answered.expand(3, -1),
        "added": torch.cat([torch.stack([answered, refused, answered]), answered + by_chance]),
        "requests": (refused, answered),
        "earlier": Earlier(2, torch.stack([refused, answered, refused]), 0.1),
    }
    pair = [contrast("refusal"), contrast("refusal"), contrast("negativity")]
    return compute_evidence(
        GEOMETRY, Responses(**scores | changed), contrasts=pair, confidence=0.95
    )


def test_random_directions_are_compared_where_they_ran_and_nowhere_else():
    e = found()
    assert e.chance_ablation_share == e.chance_addition_share == 0
    assert e.chance_ablation == e.chance_addition == e.typical_ablation == 0
    assert e.refused_harmful == 1
    assert e.ablated_harmful == 0
    assert e.bypassed == 1
    assert e.cross_ablation.value == e.cross_addition_share.value == 0
    # The control: one direction that takes every refusal away where it ran.
    harmful = torch.cat([torch.full((3, N), 4.0), torch.full((len(RANDOM), N), torch.nan)])
    harmful[1], harmful[3:, ::3] = -6, 4
    harmful[3, ::3] = -6
    strong = found(harmful=harmful)
    assert strong.chance_ablation_share == strong.chance_ablation == 1
    assert strong.typical_ablation == 0


def test_the_layer_whose_negativity_lowers_refusal_most_is_found_among_the_earlier_ones():
    unchanged, fall = torch.full((4,), 3.0), torch.tensor([0.0, 2.0, 1.0, 5.0])
    sweep = Effects(unchanged, unchanged - fall[:, None], torch.ones(4, 4))
    earlier = Earlier.of(sweep, sweep, 2)
    assert earlier.layer == 1  # layer 3 lowers it more, and comes later
    assert earlier.log_odds.tolist() == [[3.0] * 4, [2.0] * 4, [1.0] * 4]
    assert earlier.damage == 1


def sweep_of(*log_odds):
    """Scores of four prompts, unmodified 3, that each layer's ablation lowers to a number."""
    lowered = torch.tensor(log_odds)[:, None].expand(-1, 4)
    return Effects(torch.full((4,), 3.0), lowered, torch.zeros(len(log_odds), 4))


def test_another_layer_is_judged_only_where_the_highlighted_one_lets_no_requests_through():
    works, fails = -2.0, 1.0
    assert judged_layer(sweep_of(fails, works, -5.0, works, fails), 1) == 1
    assert judged_layer(sweep_of(fails, works, -5.0, works, fails), 0) == 2
    assert judged_layer(sweep_of(fails, fails, fails, fails, -5.0), 3) == 3  # 4 is too deep
    assert judged_layer(sweep_of(fails, 0.5, fails, fails, fails), 3) == 3  # 1 does no better


def test_the_strongest_layer_of_each_half_is_chosen_on_the_other_half():
    log_odds = torch.zeros(10, 4)
    log_odds[2, ::2], log_odds[5, 1::2] = -9.0, -8.0  # best on even prompts, on odd ones
    log_odds[9] = -20.0  # too deep to be chosen
    refusal = Effects(torch.full((4,), 3.0), log_odds, torch.zeros(10, 4))
    negativity = Effects(refusal.unchanged, torch.arange(10.0)[:, None].expand(-1, 4), refusal.kl)
    found = lowered_most(refusal, negativity)
    assert found[0].tolist() == [3 - 5, 3 - 2, 3 - 5, 3 - 2]
    assert found[1].tolist() == [3.0] * 4  # what the other half's layer does here


def test_the_prompts_that_choose_a_layer_are_others_than_those_that_measure_effects():
    every = contrast("refusal")
    chosen, others = some_prompts(every, 16), other_prompts(every, 16)
    assert not {*chosen.target} & {*others.target}
    assert len(others.target) == len(others.baseline) == 16
    assert other_prompts(every, 30).target == some_prompts(every, 30).target  # two are too few


def test_what_controls_leave_of_negativity_has_ratios_of_its_own():
    answered, refused = torch.full((N,), -6.0), torch.full((N,), 4.0)
    earlier = Earlier(4, torch.stack([refused, answered, answered]), 0.1)
    e = found(controlled=(answered, refused), everywhere=answered, controlled_earlier=earlier)
    assert e.controlled_earlier_ablation.value == e.controlled_earlier_ablation_share.value == 1
    assert e.earlier_ablation.value == 0
    assert e.controlled_ablation_share.value == e.controlled_addition_share.value == 1
    assert e.cross_ablation_share.value == e.cross_addition_share.value == 0
    assert e.everywhere_harmful == 0
    assert found().controlled_ablation.value != found().controlled_ablation.value  # NaN
