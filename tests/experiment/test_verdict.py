"""The rule on evidence made by hand: every answer, their order, and the thresholds as arguments."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusal_lens.errors import InputError
from refusal_lens.experiment.verdict import Estimate, Evidence, Thresholds, judge, published_rule
from refusal_lens.experiment.wording import Names, rule, verdict_lines, verdict_text
from refusal_lens.prompts.contrast import Contrast


def near(value, half_width=0.05):
    return Estimate(float(value), float(value - half_width), float(value + half_width))


DISTINCT = Evidence(
    layer=20,
    n_prompts=96,
    reliability_refusal=0.98,
    reliability_negativity=0.97,
    refused_harmful=0.99,
    refused_harmless=0.01,
    gap=near(15, 1),
    refusal_ablation=near(0.8),
    random_ablation=0.02,
    cross_ablation_gap=near(0.05),
    cross_ablation_drop=near(0.04),
    cross_addition=near(-0.1),
    statement_gap=near(0.02),
    statement_ablation=near(0.0),
    cosine=near(-0.4),
)
SHARED = replace(
    DISTINCT,
    cross_ablation_gap=near(0.95),
    cross_ablation_drop=near(0.9),
    cross_addition=near(0.8),
    statement_gap=near(0.9),
    statement_ablation=near(0.95),
    cosine=near(0.7),
)


def test_mechanisms_that_do_nothing_to_one_another_are_distinct_whatever_their_cosine():
    for cosine in (-0.4, 0.0, 0.9):
        assert judge(replace(DISTINCT, cosine=near(cosine))).answer == "distinct"


def test_negativity_that_takes_refusal_away_is_shared_whatever_their_cosine():
    for cosine in (0.05, 0.7):
        assert judge(replace(SHARED, cosine=near(cosine))).answer == "shared"


def test_negative_statements_refused_through_the_same_direction_are_shared():
    hidden = replace(DISTINCT, statement_gap=near(0.9), statement_ablation=near(0.9))
    assert judge(hidden).answer == "shared"
    # The control: refused, but by another way, is not.
    assert judge(replace(hidden, statement_ablation=near(0.1))).answer == "partly shared"


@pytest.mark.parametrize(
    "ratio", ["cross_ablation_gap", "cross_ablation_drop", "cross_addition", "statement_gap"]
)
def test_one_ratio_shown_above_the_margin_is_partly_shared(ratio):
    assert judge(replace(DISTINCT, **{ratio: near(0.4)})).answer == "partly shared"


@pytest.mark.parametrize(
    "ratio", ["cross_ablation_gap", "cross_ablation_drop", "cross_addition", "statement_gap"]
)
def test_an_interval_too_wide_to_say_is_inconclusive_and_names_it(ratio):
    verdict = judge(replace(DISTINCT, **{ratio: near(0.1, 0.5)}))
    assert verdict.answer == "inconclusive"
    assert [(reason.measure, reason.finding) for reason in verdict.reasons] == [
        (ratio, "undecided")
    ]


def test_not_finding_an_effect_is_not_finding_that_there_is_none():
    # The interval holds 0, so a test of "no effect" does not reject; that is no equivalence.
    assert judge(replace(DISTINCT, cross_ablation_gap=near(0.0, 0.6))).answer == "inconclusive"


@pytest.mark.parametrize(
    ("change", "finding", "words"),
    [
        ({"n_prompts": 15}, "too low", "Too few prompts: the smallest set has 15, below 16"),
        (
            {"reliability_refusal": 0.3},
            "too low",
            "refusal direction at layer 20 is not reliable: its split-half reliability is 0.3",
        ),
        ({"reliability_negativity": float("nan")}, "too low", "negativity direction at layer 20"),
        ({"refused_harmful": 0.2}, "too low", "does not refuse harmful prompts: it refuses 20 %"),
        ({"refused_harmful": float("nan")}, "not measured", "no intervention was run"),
        ({"refused_harmless": 0.9}, "too high", "refuses harmless prompts: it refuses 90 %"),
        ({"refusal_ablation": near(0.2)}, "not shown above", "20 % [15, 25] of the refusal gap"),
        ({"refusal_ablation": Estimate()}, "not shown above", "nan % [nan, nan]"),
        ({"random_ablation": 0.97}, "chance", "no better than a random direction"),
    ],
)
@pytest.mark.parametrize("evidence", [DISTINCT, SHARED])
def test_inconclusive_comes_before_everything_else(evidence, change, finding, words):
    verdict = judge(replace(evidence, **change))
    assert verdict.answer == "inconclusive"
    assert verdict.reasons[0].finding == finding
    assert words in verdict_lines(verdict)[0]


def test_every_threshold_is_an_argument():
    assert judge(DISTINCT, Thresholds(min_prompts=97)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(min_reliability=0.99)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(min_refused=1.0)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(max_refused_harmless=0.0)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(min_refusal_ablation=0.9)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(margin=0.05)).answer == "inconclusive"
    assert judge(SHARED, Thresholds(shared_from=0.95)).answer == "partly shared"


def test_the_rule_is_printed_with_its_own_thresholds():
    rule = judge(DISTINCT, Thresholds(margin=0.31, shared_from=0.77)).rule
    assert "+-31 %" in rule
    assert "77 %" in rule


def test_reasons_give_number_interval_and_threshold():
    text = str(judge(DISTINCT))
    assert text.startswith("verdict: distinct")
    assert (
        "Ablating negativity removes 5 % [0, 10] of the refusal that ablating refusal removes: within "
        "the 25 % margin."
    ) in text


def test_a_verdict_on_other_contrasts_has_their_names_and_not_the_bundled_ones():
    named = {"target_name": "rude", "baseline_name": "polite"}
    concepts = [
        Contrast("sycophancy", ("a",), ("b",)),
        Contrast("{rude}ness", ("c",), ("d",), **named),
    ]
    names = Names.of(*concepts)
    for evidence in (DISTINCT, SHARED, replace(DISTINCT, n_prompts=1, refusal_ablation=near(0))):
        verdict = judge(evidence)
        text = verdict_text(verdict, names) + rule(verdict.thresholds, names)
        for word in ("negativity", "harmful", "harmless", "neutral prompts", "direction a"):
            assert word not in text
    assert "Ablating {rude}ness removes 5 %" in verdict_lines(judge(DISTINCT), names)[0]
    assert "Rude prompts raise the refusal score" in verdict_lines(judge(DISTINCT), names)[3]
    # Two contrasts whose sides have the same names are told apart.
    alike = Names.of(concepts[0], replace(concepts[0], name="flattery"))
    assert alike.harmful == "sycophancy target"
    assert alike.negative == "flattery target"


@pytest.mark.parametrize(
    ("evidence", "finding"),
    [
        (replace(DISTINCT, cosine=near(0.8)), "too high"),
        (replace(SHARED, cosine=near(0.1)), "too low"),
        (DISTINCT, "reported"),
        (replace(SHARED, cosine=Estimate()), "not measured"),
    ],
)
def test_a_cosine_that_fits_the_answer_badly_is_said_to(evidence, finding):
    verdict = judge(evidence)
    assert verdict.geometry.finding == finding
    assert "cosine at layer 20" in verdict_lines(verdict)[-1]


@pytest.mark.parametrize(("margin", "shared_from"), [(0.0, 0.5), (0.6, 0.5), (0.5, 0.5)])
def test_thresholds_that_contradict_one_another_are_refused(margin, shared_from):
    with pytest.raises(InputError, match="choose 0 < margin < shared_from"):
        Thresholds(margin=margin, shared_from=shared_from)


numbers = st.floats(-2, 2) | st.just(float("nan"))
estimates = st.tuples(numbers, st.floats(0, 1)).map(lambda pair: near(*pair))


@given(estimates, estimates, estimates, estimates, estimates, estimates)
def test_any_evidence_gets_one_answer_with_reasons(
    own, closed, risen, statement_gap, statement_ablation, cosine
):
    evidence = replace(
        DISTINCT,
        refusal_ablation=own,
        cross_ablation_gap=closed,
        cross_addition=risen,
        statement_gap=statement_gap,
        statement_ablation=statement_ablation,
        cosine=cosine,
    )
    verdict = judge(evidence)
    assert verdict.answer in ("distinct", "shared", "partly shared", "inconclusive")
    assert all(verdict_lines(verdict))
    if any(ratio.value != ratio.value for ratio in (closed, risen, statement_gap)):
        assert verdict.answer != "distinct"


@pytest.mark.parametrize(
    ("cosine", "conclusion"),
    [
        (0.81, "same mechanism"),
        (0.8, "moderate overlap"),
        (0.5, "safety-specific"),
        (-0.9, "safety-specific"),
        (float("nan"), "not measurable"),
    ],
)
def test_the_published_rule_is_kept_as_it_was(cosine, conclusion):
    assert published_rule(cosine) == conclusion
