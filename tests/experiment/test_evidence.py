"""The numbers of the evidence, from scores made by hand."""

import torch

from refusal_lens.experiment.evidence import Earlier, Evidence, Responses, compute_evidence
from refusal_lens.experiment.verdict import Estimate
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
    from refusal_lens.interventions import Effects

    unchanged, fall = torch.full((4,), 3.0), torch.tensor([0.0, 2.0, 1.0, 5.0])
    sweep = Effects(unchanged, unchanged - fall[:, None], torch.ones(4, 4))
    earlier = Earlier.of(sweep, sweep, 2)
    assert earlier.layer == 1  # layer 3 lowers it more, and comes later
    assert earlier.log_odds.tolist() == [[3.0] * 4, [2.0] * 4, [1.0] * 4]
    assert earlier.damage == 1
