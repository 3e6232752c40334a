"""The rule on evidence made by hand: every answer, their order, and the thresholds as arguments."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusal_lens.errors import InputError
from refusal_lens.experiment.verdict import Estimate, Evidence, Thresholds, judge, published_rule
from refusal_lens.experiment.wording import (
    Names,
    plain_sentence,
    rule,
    verdict_lines,
    verdict_text,
)
from refusal_lens.prompts.contrast import Contrast


def near(value, half_width=0.05):
    return Estimate(float(value), float(value - half_width), float(value + half_width))


DISTINCT = Evidence(
    layer=20,
    n_prompts=96,
    reliability_refusal=0.98,
    reliability_negativity=0.97,
    covered=0.99,
    refused_harmful=0.99,
    refused_harmless=0.01,
    refused_negative=0.02,
    refused_gap=near(0.98),
    gap=near(15, 1),
    ablated_harmful=0.02,
    ablated_harmless=0.01,
    refusal_ablation=near(0.95),
    typical_ablation=0.02,
    chance_ablation=0.1,
    chance_ablation_share=0.1,
    chance_addition=0.1,
    chance_addition_share=0.1,
    chance_statements=0.1,
    kl_refusal=0.1,
    kl_negativity=0.05,
    cross_ablation=near(0.05),
    cross_ablation_share=near(0.04),
    cross_addition=near(-0.1),
    cross_addition_share=near(0.0),
    statement_share=near(0.02),
    statement_ablation=near(0.0),
    statement_own_ablation=near(0.0),
    earlier_layer=3,
    earlier_ablation=near(0.06),
    earlier_ablation_share=near(0.02),
    earlier_damage=0.2,
    cosine=near(-0.4),
)
SHARED = replace(
    DISTINCT,
    cross_ablation=near(0.95),
    cross_ablation_share=near(0.9),
    cross_addition=near(0.8),
    cross_addition_share=near(0.9),
    statement_share=near(0.9),
    statement_ablation=near(0.95),
    statement_own_ablation=near(0.9),
    earlier_ablation=near(0.95),
    earlier_ablation_share=near(0.9),
    earlier_damage=0.9,
    cosine=near(0.7),
)


def test_mechanisms_that_do_nothing_to_one_another_are_distinct_whatever_their_cosine():
    for cosine in (-0.4, 0.0, 0.9):
        assert judge(replace(DISTINCT, cosine=near(cosine))).answer == "distinct"


def test_negativity_that_takes_refusal_away_is_shared_whatever_their_cosine():
    for cosine in (0.05, 0.7):
        assert judge(replace(SHARED, cosine=near(cosine))).answer == "shared"


def test_negative_statements_refused_alike_are_shared_only_if_negativity_moves_refusal_too():
    alike = dict.fromkeys(
        ("statement_share", "statement_ablation", "statement_own_ablation"), near(0.9)
    )
    alike = replace(DISTINCT, **alike)
    moved = {"cross_addition": near(0.6), "cross_addition_share": near(0.7)}
    assert judge(replace(alike, **moved)).answer == "shared"
    assert judge(replace(alike, cross_ablation=near(0.4))).answer == "shared"
    assert judge(alike).answer == "partly shared"
    # Refused, perhaps by another way: that is no ground for either answer.
    apart = judge(replace(alike, statement_ablation=near(0.1)))
    assert apart.answer == "inconclusive"
    assert [reason.measure for reason in apart.reasons] == ["statement_share"]
    for words, answer in ((0.0, "distinct"), (0.24, "distinct"), (0.26, "inconclusive")):
        other_words = judge(replace(alike, statement_ablation=near(0.1), words_alike=words))
        assert other_words.answer == answer
    # Other words are no other mechanism where ablating refusal silences both.
    assert judge(replace(alike, words_alike=0.0)).answer == "partly shared"
    weaker = replace(alike, statement_ablation=near(0.2, 0.1), words_alike=0.0)
    assert judge(weaker).answer == "inconclusive"
    # A random direction in negativity's place lowers the refusal of statements, too.
    moved |= {"chance_statements": 0.95, "chance_addition": 0.9, "chance_addition_share": 0.9}
    assert judge(replace(alike, **moved)).answer == "inconclusive"


def test_statements_refused_by_a_second_mechanism_are_said_to_be():
    second = {"statement_share": near(1.0), "statement_ablation": near(0.1), "words_alike": 0.0}
    verdict = judge(replace(DISTINCT, **second, refused_negative=1.0))
    assert verdict.answer == "distinct"
    assert "refuses 100 % of negative prompts, too, but in other words" in plain_sentence(verdict)
    lines = verdict_lines(verdict)
    assert (
        "Ablating refusal lowers the refusal score of negative prompts by 10 % [5, 15] of what it does "
        "for harmful prompts: within the 25 % margin." in lines
    )
    assert (
        "The openings of refusals of negative and of harmful prompts have 0 % in common: below the "
        "25 % margin." in lines
    )


def test_negativity_upstream_of_refusal_is_shared_though_later_layers_show_nothing():
    upstream = {"earlier_ablation": near(0.97), "earlier_ablation_share": near(1.0)}
    verdict = judge(replace(DISTINCT, **upstream))
    assert verdict.answer == "shared"
    assert "what layer 3 holds of negativity: removing that leaves 0 %" in plain_sentence(verdict)
    assert judge(replace(DISTINCT, **upstream, earlier_damage=9.0)).answer == "inconclusive"
    by_chance = {"chance_ablation": 0.99, "chance_ablation_share": 1.0}
    assert judge(replace(DISTINCT, **upstream, **by_chance)).answer == "distinct"
    wide = judge(replace(DISTINCT, earlier_ablation=near(0.9, 0.7)))
    assert wide.answer == "inconclusive"
    assert [reason.measure for reason in wide.reasons] == ["earlier_ablation"]
    assert "may carry refusal as well" in plain_sentence(wide)
    # Less than most of refusal, and it is neither.
    some = judge(replace(DISTINCT, earlier_ablation=near(0.4)))
    assert some.answer == "inconclusive"
    assert some.reasons[0].measure == "earlier_ablation"


def test_sympathy_is_nothing_to_the_verdict_where_no_negative_statement_is_refused():
    assert judge(replace(DISTINCT, statement_ablation=near(3.0, 2.0))).answer == "distinct"


@pytest.mark.parametrize("ratio", ["cross_ablation", "cross_addition"])
def test_scores_above_the_margin_are_partly_shared_if_the_share_refused_may_move_too(ratio):
    moved = replace(DISTINCT, **{ratio: near(0.4), f"{ratio}_share": near(0.2, 0.1)})
    assert judge(moved).answer == "partly shared"
    still = judge(replace(DISTINCT, **{ratio: near(0.4)}))
    assert still.answer == "inconclusive"
    assert [reason.measure for reason in still.reasons] == [ratio]


@pytest.mark.parametrize(
    "change",
    [
        {"cross_ablation_share": near(0.86), "cross_ablation": near(0.2)},
        {"cross_addition_share": near(0.61), "cross_addition": near(0.2)},
    ],
)
def test_a_changed_share_of_refused_prompts_vetoes_distinct(change):
    # Ablation took 90 % of refusals to 13 %, or addition made 61 % of harmless prompts refused.
    assert judge(replace(DISTINCT, **change)).answer == "partly shared"


def controlled(ablation, addition, norm=0.8):
    ratios = {"ablation": ablation, "addition": addition}
    ratios["earlier_ablation"] = ablation
    shares = {f"controlled_{name}_share": near(value) for name, value in ratios.items()}
    return (
        {f"controlled_{k}": near(v) for k, v in ratios.items()} | shares | {"controlled_norm": norm}
    )


def test_what_negativity_does_by_arousal_alarm_or_words_is_no_obstacle_to_distinct():
    moving = replace(DISTINCT, cross_addition=near(0.35), cross_addition_share=near(0.33))
    assert judge(moving).answer == "partly shared"
    verdict = judge(replace(moving, **controlled(0.05, 0.1)))
    assert verdict.answer == "distinct"
    assert ("controlled_addition", "within") in [(r.measure, r.finding) for r in verdict.reasons]
    assert "what negativity shares with its controls" in plain_sentence(verdict)
    # The control: what is left of negativity moves refusal as well, or little of it is left.
    assert judge(replace(moving, **controlled(0.05, 0.4))).answer == "partly shared"
    assert judge(replace(moving, **controlled(0.05, 0.1, norm=0.4))).answer == "inconclusive"


def test_refusal_that_only_the_controls_part_of_negativity_removes_is_not_shared():
    by_ablation = replace(SHARED, statement_share=near(0))
    assert judge(by_ablation).answer == "shared"
    assert judge(replace(by_ablation, **controlled(0.8, 0.8))).answer == "shared"
    # Controls may hold the mechanism itself: refusals that go away forbid `distinct`.
    for norm in (0.8, 0.4, 0.0):
        verdict = judge(replace(by_ablation, **controlled(0.1, 0.1, norm=norm)))
        assert verdict.answer == "inconclusive"
        assert "cross_ablation_share" in {reason.measure for reason in verdict.reasons}


def test_refusals_that_an_earlier_layers_negativity_removes_forbid_distinct_whatever_controls_do():
    earlier = {"earlier_ablation": near(0.9), "earlier_ablation_share": near(0.9)}
    verdict = judge(replace(DISTINCT, **earlier, **controlled(0.1, 0.1)))
    assert verdict.answer == "inconclusive"
    assert verdict.reasons[0].measure == "earlier_ablation_share"
    scores = {"earlier_ablation": near(0.9), "earlier_ablation_share": near(0)}
    assert judge(replace(DISTINCT, **scores)).answer == "inconclusive"
    excused = judge(replace(DISTINCT, **scores, **controlled(0.1, 0.1)))
    assert excused.answer == "distinct"
    assert "an earlier layer's negativity lowers the refusal score" in verdict_text(excused)


def test_earlier_layers_decide_nothing_where_refusal_is_several_directions():
    upstream = replace(
        DISTINCT, earlier_ablation=near(0.9), earlier_ablation_share=near(0.9), n_directions=3
    )
    assert judge(replace(upstream, n_directions=1)).answer == "shared"
    assert judge(upstream).answer == "inconclusive"


def test_scores_count_in_part_only_if_the_share_that_controls_leave_may_move_too():
    both = {"cross_ablation": near(0.4), "cross_ablation_share": near(0.4)}
    still = controlled(0.4, 0) | {"controlled_ablation_share": near(0, 0.02)}
    assert judge(replace(DISTINCT, **both, **controlled(0.4, 0))).answer == "partly shared"
    assert judge(replace(DISTINCT, **both, **still)).answer == "inconclusive"


def test_adding_negativity_that_lowers_refusal_is_an_effect_as_well():
    assert judge(replace(DISTINCT, cross_addition=near(-0.9))).answer == "inconclusive"


def test_an_undecided_number_is_the_one_that_is_printed():
    verdict = judge(replace(SHARED, statement_share=near(0), **controlled(0.3, 0.3)))
    text = verdict_text(verdict)
    assert "what controls leave of negativity lowers" in text
    assert "95 % [90, 100] of what ablating refusal does: neither" not in text


def test_a_number_above_its_margin_is_not_said_to_be_undecided():
    verdict = judge(replace(DISTINCT, statement_share=near(0.97)))
    assert verdict.answer == "inconclusive"
    [line] = [each for each in verdict_lines(verdict) if "are refused" in each]
    assert "above 25 %, but the rest of what shows a shared mechanism is missing" in line
    wide = judge(replace(DISTINCT, statement_share=near(0.97, 0.8)))
    assert "neither above nor within the 25 % margin" in verdict_text(wide)


@pytest.mark.parametrize(
    ("evidence", "ratio", "disagrees"),
    [
        (DISTINCT, 0.6, True),
        (DISTINCT, 0.1, False),
        (SHARED, 0.05, True),
        (SHARED, 0.9, False),
    ],
)
def test_a_verdict_says_where_the_strongest_layer_disagrees(evidence, ratio, disagrees):
    verdict = judge(replace(evidence, strongest_layer=11, strongest_ablation=near(ratio)))
    assert ("which disagrees" in verdict_text(verdict)) == disagrees
    assert "Where ablating refusal does most (layer 11)" in verdict_text(verdict)


def test_a_verdict_names_a_layer_other_than_the_highlighted_one_and_several_directions():
    assert "highlighted" not in plain_sentence(judge(replace(DISTINCT, highlighted=20)))
    other = judge(replace(DISTINCT, highlighted=17, n_directions=2))
    assert "layer 17 is not judged" in plain_sentence(other)
    assert "Refusal is 2 directions of layer 20" in plain_sentence(other)


def test_scores_that_fall_while_prompts_stay_refused_are_not_shared():
    still_refused = replace(
        SHARED,
        cross_ablation_share=near(0.2, 0.1),
        earlier_ablation_share=near(0.0),
        **dict.fromkeys(("cross_addition", "cross_addition_share"), near(0.0)),
        statement_share=near(0.0),
    )
    assert judge(still_refused).answer == "partly shared"


def test_effects_that_random_directions_have_too_are_no_evidence():
    for ratio in ("ablation", "addition"):
        names = f"cross_{ratio}", f"cross_{ratio}_share"
        chance = dict.fromkeys((f"chance_{ratio}", f"chance_{ratio}_share"), 0.97)
        verdict = judge(replace(DISTINCT, **chance, **dict.fromkeys(names, near(0.6))))
        # The scores might be chance; so large a share of prompts forbids to call it distinct.
        assert verdict.answer == "inconclusive"
        assert [reason.measure for reason in verdict.reasons] == [names[1]]


def test_scores_that_move_no_more_than_by_chance_are_no_obstacle_to_distinct():
    by_chance = {"cross_ablation": near(0.4), "chance_ablation": 0.5}
    verdict = judge(replace(DISTINCT, **by_chance))
    assert verdict.answer == "distinct"
    assert verdict.reasons[0].finding == "chance"
    assert "a random direction does 50 %" in verdict_lines(verdict)[0]
    # Without the random directions that do as much, it is an effect.
    assert judge(replace(DISTINCT, cross_ablation=near(0.4))).answer == "inconclusive"
    share = {"cross_addition_share": near(0.2, 0.15), "chance_addition_share": 0.3}
    assert judge(replace(DISTINCT, **share)).answer == "distinct"
    assert judge(replace(DISTINCT, **share | {"chance_addition_share": 0.0})).answer != "distinct"


def test_an_ablation_that_damages_the_model_shows_no_shared_mechanism():
    damaged = replace(SHARED, kl_negativity=2.0)
    verdict = judge(damaged)
    assert verdict.answer == "inconclusive"
    assert "2 nats of KL divergence" in verdict_lines(verdict)[0]


def test_a_gap_that_closes_from_the_wrong_end_is_no_working_refusal_direction():
    wrong_end = replace(DISTINCT, ablated_harmful=0.99, ablated_harmless=0.96)
    verdict = judge(wrong_end)
    assert verdict.answer == "inconclusive"
    assert "does not let harmful prompts through" in verdict_lines(verdict)[0]


def test_a_model_that_refuses_less_than_half_of_harmful_prompts_can_be_judged():
    weak = replace(DISTINCT, refused_harmful=0.41, refused_gap=near(0.4), ablated_harmful=0.03)
    assert judge(weak).answer == "distinct"


def test_a_model_that_may_refuse_in_other_words_is_said_to_where_no_refusal_is_seen():
    unseen = {"refused_harmful": 0.0, "refused_gap": near(0.0)}
    verdict = judge(replace(DISTINCT, covered=0.1, **unseen))
    assert verdict.answer == "inconclusive"
    assert "name them with --refusal-openings" in verdict_lines(verdict)[1]
    assert "But only 10 % of replies" in plain_sentence(verdict)
    known = judge(replace(DISTINCT, **unseen))
    assert "But only" not in plain_sentence(known)
    assert [reason.measure for reason in known.reasons] == ["refused_gap"]


@pytest.mark.parametrize(
    "ratio", ["cross_ablation", "cross_ablation_share", "cross_addition", "cross_addition_share"]
)
def test_an_interval_too_wide_to_say_is_inconclusive_and_names_it(ratio):
    verdict = judge(replace(DISTINCT, **{ratio: near(0.1, 0.5)}))
    assert verdict.answer == "inconclusive"
    assert [(reason.measure, reason.finding) for reason in verdict.reasons] == [
        (ratio, "undecided")
    ]


def test_not_finding_an_effect_is_not_finding_that_there_is_none():
    # The interval holds 0, so a test of "no effect" does not reject; that is no equivalence.
    assert judge(replace(DISTINCT, cross_ablation=near(0.0, 0.6))).answer == "inconclusive"


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
        ({"refused_gap": near(0.1)}, "not shown above", "does not refuse harmful prompts clearly"),
        ({"refused_harmful": float("nan")}, "not measured", "no intervention was run"),
        ({"constant_token": "<think>"}, "not measured", "every reply begins with '<think>'"),
        ({"ablated_harmful": 0.9}, "too low", "it removes 9 % of their refusal"),
        ({"ablated_harmless": 0.9}, "too high", "makes 90 % of harmless prompts refused"),
        ({"refusal_ablation": near(0.2)}, "not shown above", "by 20 % [15, 25] of the gap"),
        ({"refusal_ablation": Estimate()}, "not shown above", "by not measured of the gap"),
        (
            {"refusal_ablation": Estimate(0.1, -float("inf"), float("inf"))},
            "not shown above",
            "by not measurable of the gap",
        ),
        ({"typical_ablation": 0.8}, "too high", "Ablating a random direction lowers the refusal"),
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
    assert judge(DISTINCT, Thresholds(min_refused_gap=0.95)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(min_bypassed=1.0)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(max_over_refusal=-0.1)).answer == "inconclusive"
    assert judge(SHARED, Thresholds(max_damage=0.1)).answer == "inconclusive"
    assert judge(DISTINCT, Thresholds(margin=0.05)).answer == "inconclusive"
    assert judge(SHARED, Thresholds(shared_from=0.95)).answer == "partly shared"


def test_the_rule_is_printed_with_its_own_thresholds():
    words = rule(Thresholds(margin=0.31, shared_from=0.77))
    assert "+-31 %" in words
    assert "77 %" in words


def test_reasons_give_number_interval_and_threshold():
    text = str(judge(DISTINCT))
    assert text.startswith("verdict: distinct")
    assert (
        "Ablating negativity removes 4 % [-1, 9] of the refusals that ablating refusal removes: within "
        "the 25 % margin."
    ) in text


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        (
            DISTINCT,
            "own here. Removing negativity leaves 96 % of refusal; adding it brings 0 %.",
        ),
        (SHARED, "share a mechanism here. Removing negativity leaves 10 % of refusal; adding it"),
        (
            replace(SHARED, cross_ablation=near(0.4), cross_ablation_share=near(0.1, 0.4)),
            "99 % of harmful and 2 % of negative prompts. Removing refusal lowers the refusal of both",
        ),
        (replace(DISTINCT, cross_ablation_share=near(-0.2)), "leaves 100 % of refusal"),
        (
            replace(DISTINCT, refused_gap=near(0), refused_harmful=0.04),
            "refuses 4 % of harmful and 1 % of harmless prompts: there is too little refusal",
        ),
        (replace(DISTINCT, n_prompts=5), "With 5 prompts in the smallest set nothing can be told."),
        (replace(DISTINCT, reliability_negativity=0.1), "would give another negativity direction"),
        (
            replace(DISTINCT, typical_ablation=0.9),
            "Removing a random direction does nearly as much",
        ),
    ],
)
def test_every_verdict_has_a_plain_sentence_with_the_effects_behind_it(evidence, says):
    verdict = judge(evidence)
    assert says in plain_sentence(verdict)
    assert plain_sentence(verdict) in verdict_text(verdict)


def test_the_rule_in_words_has_every_threshold():
    own = Thresholds(17, 0.55, 0.11, 0.62, 0.58, 0.13, 0.77, 3.5, 0.46, 0.27, 0.52)
    assert len({*vars(own).values()}) == 11
    percents = ("11 %", "62 %", "58 %", "13 %", "77 %", "46 %", "27 %", "52 %")
    words = " ".join(rule(own).split())
    for written in ("17 ", "0.55", "3.5 ", *percents):
        assert written in words, written


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
    assert "Ablating {rude}ness removes 4 %" in verdict_lines(judge(DISTINCT), names)[1]
    assert "Rude prompts are refused 2 %" in verdict_lines(judge(DISTINCT), names)[4]
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
    own, closed, risen, statement_share, statement_ablation, cosine
):
    evidence = replace(
        DISTINCT,
        refusal_ablation=own,
        cross_ablation=closed,
        cross_addition=risen,
        statement_share=statement_share,
        statement_ablation=statement_ablation,
        cosine=cosine,
    )
    verdict = judge(evidence)
    assert verdict.answer in ("distinct", "shared", "partly shared", "inconclusive")
    assert all(verdict_lines(verdict))
    assert plain_sentence(verdict).endswith(".")
    if any(ratio.value != ratio.value for ratio in (closed, risen)):
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
