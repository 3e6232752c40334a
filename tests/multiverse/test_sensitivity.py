"""What a cosine depends on: right activations, shared runs, the choice that matters most named."""

import csv
import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import isnan

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from refusal_lens.activations.extract import get_layer_activations, get_prompt_activations
from refusal_lens.directions.similarity import cosine_similarity
from refusal_lens.errors import InputError
from refusal_lens.experiment.causal import divide_sweep
from refusal_lens.experiment.config import spread
from refusal_lens.experiment.wording import verdict_lines
from refusal_lens.interventions import Effects, add_direction, openings_of, refusal_log_odds
from refusal_lens.interventions.hooks import projection_hooks
from refusal_lens.interventions.sweep import affine_references
from refusal_lens.models.load import load_model
from refusal_lens.multiverse import activations as activations_module
from refusal_lens.multiverse.activations import contexts, read_contexts, shared_rows
from refusal_lens.multiverse.results import Sensitivity
from refusal_lens.multiverse.run import run_sensitivity
from refusal_lens.multiverse.specifications import STEPS, Family, specify
from refusal_lens.plotting import specification_curve
from refusal_lens.prompts.contrast import Contrast, load_contrast
from refusal_lens.prompts.protocol import ASSUMED_SYSTEM_PROMPT, DEFAULT, PUBLISHED
from refusal_lens.prompts.tokenize import encode_prompts
from refusal_lens.uncertainty import Cause, Gram
from refusal_lens.uncertainty.effects import cosine_difference

PROMPTS = ("How do I build a bomb?", "Hi", "How do I bake a cake?", "Why is the sky blue today?")

CAUSAL_PROMPTS = 4


@pytest.fixture(scope="module")
def model():
    return load_model("organism:specific", device="cpu")


@pytest.fixture(scope="module")
def contrasts() -> tuple[Contrast, Contrast]:
    def first(contrast: Contrast, n: int) -> Contrast:
        names = contrast.target_name, contrast.baseline_name
        return Contrast(contrast.name, contrast.target[:n], contrast.baseline[:n], *names, True)

    return first(load_contrast("refusal"), 24), first(load_contrast("negativity"), 24)


@pytest.fixture(scope="module")
def sensitivity(model, contrasts) -> Sensitivity:
    return run_sensitivity(
        model,
        contrasts,
        sizes=(5, 20, 96),
        draws=2,
        n_resamples=1000,
        causal_prompts=CAUSAL_PROMPTS,
        progress=False,
    )


# Activations


def published_script_activations(prompts) -> torch.Tensor:
    """`hidden_states[l][:, -1]` of right-padded batches of two, in plain Hugging Face code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(files("refusal_lens.organisms") / "specific")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    rows = []
    for start in range(0, len(prompts), 2):
        texts = [
            tokenizer.bos_token
            + tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": ASSUMED_SYSTEM_PROMPT},
                    {"role": "user", "content": prompt},
                ],
                tokenize=False,
            )
            for prompt in prompts[start : start + 2]
        ]
        batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            states = hf(**batch, output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[:, -1] for state in states[:-1]], dim=1))
    return torch.cat(rows)


def test_a_specification_that_the_chat_template_refuses_is_skipped_with_its_reason(
    monkeypatch, model
):
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    own = model.tokenizer.chat_template
    monkeypatch.setattr(model.tokenizer, "chat_template", no_system + "{% endif %}" + own)
    contrasts = tuple(
        Contrast(each.name, each.target[:6], each.baseline[:6])
        for each in map(load_contrast, ("refusal", "negativity"))
    )
    options = {"sizes": (), "n_resamples": 1000, "causal_prompts": 0, "progress": False}
    found = run_sensitivity(model, contrasts, **options)
    published = [f"+ {step}" for step in STEPS if step != "no system prompt"]
    assert [*found.skipped] == ["published, 5 prompts a set", *published, "a system prompt"]
    assert all("no system role" in reason for reason in found.skipped.values())
    assert len(found.specifications) == len(found.plain) > 8
    assert "Skipped: a system prompt (the chat template fails" in str(found)
    # The control: a template that refuses the default protocol too ends the command.
    model.tokenizer.chat_template = "{{ raise_exception('no user role') }}"
    with pytest.raises(InputError, match="no user role"):
        run_sensitivity(model, contrasts, **options)


def test_the_published_protocol_reads_what_its_script_reads_padding_and_all(model):
    places = contexts(model, PROMPTS, PUBLISHED)
    assert [place.padding > 0 for place in places] == [False, True, True, False]
    streams = read_contexts(model, places, progress=False)
    found = torch.stack([streams[place] for place in places])[:, :-1]
    expected = published_script_activations(PROMPTS)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    # The control: without padding other vectors are read where it was read, and only there.
    sound = contexts(model, PROMPTS, replace(PUBLISHED, padding="left"))
    streams = read_contexts(model, sound, progress=False)
    apart = (torch.stack([streams[place] for place in sound])[:, 20] - expected[:, 20]).norm(dim=-1)
    assert (apart[[1, 2]] > 1).all()
    assert (apart[[0, 3]] < 1e-3).all()


def test_without_padding_the_activations_are_those_of_get_prompt_activations(model):
    for protocol in (
        DEFAULT,
        replace(DEFAULT, positions=("last_prompt_token",)),
        replace(DEFAULT, generation_prompt=False, system_prompt="Be kind."),
    ):
        places = contexts(model, PROMPTS, protocol)
        streams = read_contexts(model, places, progress=False)
        expected = get_prompt_activations(model, PROMPTS, protocol=protocol, progress=False)
        for place, row in zip(places, expected[:, 0], strict=True):
            torch.testing.assert_close(streams[place][1:], row, atol=1e-4, rtol=1e-4)


def test_prompts_that_share_tokens_share_a_row_and_no_row_begins_with_another():
    wanted = [(1, 2, 3), (1, 2), (1, 2, 4), (1,), (5,)]
    rows = shared_rows([*wanted, *wanted])
    assert sorted(rows) == [((1, 2, 3), [3, 2, 1]), ((1, 2, 4), [3]), ((5,), [1])]
    assert sorted(ids[:n] for ids, lengths in rows for n in lengths) == sorted(wanted)


def test_protocols_that_share_tokens_share_their_runs(model, monkeypatch):
    ran = []

    def counting(model, inputs, **options):
        ran.append(len(inputs.tokens))
        return run(model, inputs, **options)

    run = activations_module.read_residual_stream
    monkeypatch.setattr(activations_module, "read_residual_stream", counting)
    sharing = [
        DEFAULT,
        replace(DEFAULT, generation_prompt=False),
        replace(DEFAULT, hook="resid_pre"),
        replace(DEFAULT, positions=("last_prompt_token",)),
        replace(DEFAULT, positions=(-3,)),
    ]
    read_contexts(model, [r for p in sharing for r in contexts(model, PROMPTS, p)], progress=False)
    assert ran == [len(PROMPTS)]
    # The control: what shares no token but the first does not share a run.
    apart = replace(DEFAULT, system_prompt="Be kind.")
    read_contexts(
        model, [r for p in (DEFAULT, apart) for r in contexts(model, PROMPTS, p)], progress=False
    )
    assert ran == [len(PROMPTS), 2 * len(PROMPTS)]


# The whole


def test_the_default_is_the_cosine_that_the_experiment_reports(model, contrasts, sensitivity):
    directions = [
        target.mean(0) - baseline.mean(0)
        for target, baseline in (
            get_layer_activations(model, contrast, progress=False) for contrast in contrasts
        )
    ]
    expected = cosine_similarity(*directions).double()
    torch.testing.assert_close(sensitivity.plain[sensitivity.default], expected, atol=1e-4, rtol=0)


def test_the_way_from_published_to_default_changes_one_choice_a_step(contrasts):
    steps = [
        s
        for s in specify(contrasts, sizes=(), draws=1, seed=0)
        if s.family is Family.PUBLISHED_TO_DEFAULT
    ]
    assert steps[0].protocol == PUBLISHED
    assert steps[0].n_prompts == 5
    assert steps[-1].protocol == DEFAULT
    assert steps[-1].name == "default"
    for before, after in pairwise(steps):
        a, b = before.choices(), after.choices()
        assert sum(a[name] != b[name] for name in a) == 1, after.name


def test_around_the_default_every_choice_is_changed_alone(contrasts):
    specifications = specify(contrasts, sizes=(5,), draws=2, seed=0)
    default = next(s for s in specifications if s.is_default).choices()
    changed = []
    for s in specifications:
        if s.family in (Family.ONE_CHOICE, Family.SUBSET):
            different = [name for name in default if s.choices()[name] != default[name]]
            assert len(different) == 1, s.name
            changed += different
    assert set(changed) == set(default)


def test_subsets_keep_pairs_together_and_differ_from_draw_to_draw(contrasts):
    subsets = [
        s for s in specify(contrasts, sizes=(5, 96), draws=3, seed=0) if s.family is Family.SUBSET
    ]
    assert [s.n_prompts for s in subsets] == [5, 5, 5]
    assert all(s.rows[0] == s.rows[1] and s.rows[2] == s.rows[3] for s in subsets)
    assert len({s.rows for s in subsets}) == 3
    unpaired = tuple(replace(c, paired=False) for c in contrasts)
    free = [s for s in specify(unpaired, sizes=(5,), draws=1, seed=0) if s.family is Family.SUBSET]
    assert free[0].rows[0] != free[0].rows[1]


def test_the_choice_that_matters_most_is_named_with_its_number_and_interval(sensitivity):
    first = sensitivity.changes[0]
    largest = max(abs(change.moved.value) for change in sensitivity.changes)
    assert abs(first.moved.value) == largest
    assert first.moved.lower < first.moved.value < first.moved.upper
    row = [s.name for s in sensitivity.specifications].index(first.choice)
    at_default = sensitivity.plain[sensitivity.default, sensitivity.layer]
    moved = sensitivity.plain[row, sensitivity.layer] - at_default
    assert first.moved.value == pytest.approx(float(moved))
    sentence = sensitivity.sentence()
    assert first.choice in sentence
    value, lower, upper = first.moved.value, first.moved.lower, first.moved.upper
    assert f"{value:+.3f} [{lower:+.3f}, {upper:+.3f}]" in sentence
    assert "5 prompts a set instead of 24, the cosine ranges from" in sensitivity.scatter()


def specified(values: list[float], **columns: list[str]) -> pd.DataFrame:
    names = [f"<b>{i}</b>" for i in range(len(values))]
    ends = {"lower": torch.nan, "upper": torch.nan}
    return pd.DataFrame({"specification": names, "family": "", "value": values, **ends, **columns})


def test_numbers_of_prompts_stand_by_their_size():
    choices = {"prompts a set": ["5", "108", "20"], "BOS": ["two", "one", "two"]}
    figure = specification_curve(specified([0.1, 0.2, 0.3], **choices), list(choices))
    assert list(figure.layout.yaxis2.ticktext) == [
        "prompts a set: 5",
        "prompts a set: 20",
        "prompts a set: 108",
        "BOS: two",
        "BOS: one",
    ]


def test_the_table_has_every_specification_and_layer_with_its_conclusion(sensitivity, tmp_path):
    sensitivity.save(tmp_path)
    with (tmp_path / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(sensitivity.specifications) * 32
    default = [row for row in rows if row["specification"] == "default"]
    assert float(default[20]["plain"]) == pytest.approx(
        float(sensitivity.plain[sensitivity.default, 20])
    )
    assert {row["published rule"] for row in rows} >= {"safety-specific"}
    assert default[20]["verdict"] == sensitivity.verdicts[sensitivity.default][20].answer
    document = json.loads((tmp_path / "sensitivity.json").read_text())
    assert document["sentence"] == sensitivity.sentence()
    at_default = document["evidence"][sensitivity.default][20]
    gap = sensitivity.verdicts[sensitivity.default][20].evidence.gap
    assert at_default["gap"]["value"] == pytest.approx(gap.value)
    assert document["provenance"]["thresholds"]["margin"] == 0.25
    with_bugs = [s for s in document["specifications"] if s["bugs"]]
    assert with_bugs
    assert all(s["protocol"]["allow_bugs"] for s in with_bugs)
    assert "plotly" in (tmp_path / "sensitivity.html").read_text()
    assert sensitivity.sentence() in str(sensitivity)
    assert "<table" in sensitivity._repr_html_()


# Verdicts


def only_at(position, hooks):
    """The hooks, changing one position alone."""

    def limited(change):
        def hook_fn(x, hook):
            here = change(x[:, position, None], hook)
            return torch.cat([x[:, :position], here, x[:, position + 1 :]], dim=1)

        return hook_fn

    return [(name, limited(change)) for name, change in hooks]


def scores(model, prompts, hooks=()) -> torch.Tensor:
    """Log-odds of the refusal openings' first tokens, one prompt at a time."""
    found = []
    for ids in encode_prompts(model.tokenizer, prompts):
        with torch.no_grad(), model.hooks(fwd_hooks=only_at(len(ids) - 1, hooks)):
            logits = model(torch.tensor([ids]))[:, -1]
        found.append(refusal_log_odds(logits, openings_of(model.tokenizer).first_tokens))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["default", "layers counted at the input", "20 prompts, draw 1"])
def test_a_verdict_rests_on_what_the_specification_s_own_directions_do(
    model, contrasts, sensitivity, name
):
    # The whole chain again, one intervention at a time, by the hooks that users have.
    row = [s.name for s in sensitivity.specifications].index(name)
    specification = sensitivity.specifications[row]
    place = 20 - (specification.protocol.hook == "resid_pre")
    directions, baselines = [], []
    for i, contrast in enumerate(contrasts):
        target, baseline = get_layer_activations(model, contrast, progress=False)
        rows = [list(side) for side in specification.rows[2 * i : 2 * i + 2]]
        directions.append(target[rows[0], place].mean(0) - baseline[rows[1], place].mean(0))
        baselines.append(baseline)
    refusal, negativity = directions
    sets = [spread(side, CAUSAL_PROMPTS) for c in contrasts for side in (c.target, c.baseline)]
    harmful, harmless, negative, neutral = (scores(model, each) for each in sets)

    def change(prompts, before, hooks) -> float:
        return float((scores(model, prompts, hooks) - before).mean())

    def ablated(direction, baseline):
        references = affine_references(direction, baseline)
        return projection_hooks(model, normalize(direction, dim=-1), references)

    gap = float(harmful.mean() - harmless.mean())
    refused = [float((each > 0).double().mean()) for each in (harmful, harmless, negative, neutral)]
    lost = change(sets[0], harmful, ablated(refusal, baselines[0]))
    expected = {
        "gap": gap,
        "refusal_ablation": -lost / gap,
        "cross_ablation": change(sets[0], harmful, ablated(negativity, baselines[0])) / lost,
        "cross_addition": change(sets[1], harmless, add_direction(model, negativity, place)) / gap,
        "statement_share": (refused[2] - refused[3]) / (refused[0] - refused[1]),
        "statement_ablation": change(sets[2], negative, ablated(refusal, baselines[1])) / lost,
    }
    evidence = sensitivity.verdicts[row][20].evidence
    found = {key: getattr(evidence, key).value for key in expected}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert gap > 5
    assert evidence.n_prompts == specification.n_prompts
    assert evidence.cosine.value == pytest.approx(float(sensitivity.unbiased[row, 20]), nan_ok=True)


def test_too_few_prompts_for_a_direction_are_the_first_reason(sensitivity):
    for specification, row in zip(sensitivity.specifications, sensitivity.verdicts, strict=True):
        few = specification.n_prompts < 16
        assert all((verdict.reasons[0].measure == "n_prompts") == few for verdict in row)
        # Where no verdict is possible, nothing was run for one.
        assert all(isnan(verdict.evidence.refused_harmful) == few for verdict in row)


def test_cells_that_specifications_share_run_once_and_go_to_each_of_them():
    ran = []

    def effects(directions: torch.Tensor, layers: torch.Tensor) -> Effects:
        ran.append(len(directions))
        each = (directions.sum(-1) * (1 + layers))[:, None] * torch.tensor([1.0, 2.0])
        return Effects(torch.zeros(2), each, -each)

    directions = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    directions[1, 1:] = directions[0, :2]
    directions[1, 0] = torch.nan
    layers = torch.tensor([[0, 1, 2], [-1, 0, 2]])  # the last direction is at another layer here
    found = divide_sweep(effects, directions, layers)
    assert ran == [5]
    expected = directions.sum(-1) * (1 + layers)
    torch.testing.assert_close(found.log_odds[..., 0], expected, equal_nan=True)
    torch.testing.assert_close(found.kl[..., 1], -2 * expected, equal_nan=True)


def test_an_interrupted_sweep_keeps_what_was_finished_and_runs_the_rest(monkeypatch):
    monkeypatch.setattr("refusal_lens.experiment.causal.CELLS_AT_ONCE", 2)
    finished, ran = {}, []

    def stored(cells: str, run):
        if cells not in finished:
            finished[cells] = run()
        return finished[cells]

    def effects(directions: torch.Tensor) -> Effects:
        if len(ran) == 2:
            ran.append("died")
            raise InputError("died")
        ran.append(len(directions))
        return Effects(torch.zeros(1), directions.sum(-1, keepdim=True), directions[:, :1])

    directions = torch.arange(35.0).reshape(5, 7)
    with pytest.raises(InputError, match="died"):
        divide_sweep(effects, directions, remember=stored)
    found = divide_sweep(effects, directions, remember=stored)
    assert ran == [2, 2, "died", 1]
    assert torch.equal(found.log_odds[:, 0], directions.sum(-1))
    assert torch.equal(found.kl[:, 0], directions[:, 0])


def test_with_no_prompts_to_intervene_on_every_verdict_says_so(model, contrasts):
    found = run_sensitivity(
        model, contrasts, sizes=(), n_resamples=400, causal_prompts=0, progress=False
    )
    verdicts = [verdict for row in found.verdicts for verdict in row]
    assert {verdict.answer for verdict in verdicts} == {"inconclusive"}
    assert all("no intervention was run" in verdict_lines(verdict)[-2] for verdict in verdicts)
    for too_few in (1, -1):
        with pytest.raises(InputError, match=f"causal_prompts is {too_few}"):
            run_sensitivity(model, contrasts, causal_prompts=too_few, progress=False)


def test_where_nothing_can_be_estimated_there_is_a_reason_and_no_number(sensitivity):
    unknown = sensitivity.unbiased.isnan()
    for i, reasons in enumerate(sensitivity.reasons):
        assert [reason is not None for reason in reasons] == unknown[i].tolist()
    # Counted at the input, layer 0 is the embedding's output, which has seen no prompt.
    names = [s.name for s in sensitivity.specifications]
    pre = names.index("layers counted at the input")
    assert sensitivity.reasons[pre][0].cause is Cause.CONSTANT
    assert sensitivity.lower[pre, 0].isnan()


def test_a_layer_that_is_not_there_is_refused(model, contrasts, sensitivity):
    with pytest.raises(InputError, match="layer 32 is out of range"):
        run_sensitivity(model, contrasts, layer=32, progress=False)
    with pytest.raises(InputError, match="no layer 40"):
        sensitivity.figure(40)


# The figure


def test_the_curve_is_sorted_and_marks_what_each_specification_chose(sensitivity):
    figure = sensitivity.figure()
    points = [t for t in figure.data if t.yaxis == "y"]
    drawn = sorted((x, y) for t in points for x, y in zip(t.x, t.y, strict=True))
    assert [y for _, y in drawn] == sorted(y for _, y in drawn)
    assert len(drawn) == len(sensitivity.specifications)
    marks = [t for t in figure.data if t.yaxis == "y2"]
    verdicts = [t for t in marks if t.marker.symbol == "square"]
    marks = [t for t in marks if t.marker.symbol != "square"]
    assert sum(len(t.x) for t in verdicts) == len(sensitivity.specifications)
    options = {
        (name, option) for s in sensitivity.specifications for name, option in s.choices().items()
    }
    assert len(marks) == len(options)
    assert sum(len(t.x) for t in marks) == 7 * len(sensitivity.specifications)


def test_a_curve_without_numbers_says_so_and_text_is_shown_verbatim():
    empty = specification_curve(specified([torch.nan, torch.nan]), [])
    assert "Nothing to draw" in empty.layout.annotations[0].text
    figure = specification_curve(specified([0.1, torch.nan], c=["1", "2"]), ["c"])
    assert "&lt;b&gt;0" in figure.data[0].text[0]
    with pytest.raises(InputError, match="no column 'BOS'"):
        specification_curve(specified([0.1]), ["BOS"])


# The interval of a difference


@cache
def gram(seed: int, noise: float, shift: float = 0.0, paired: bool = True) -> Gram:
    """Two contrasts of 12 prompts over three layers; `noise` is drawn again for each seed."""
    base = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)

    def side(mean: torch.Tensor) -> torch.Tensor:
        shared = torch.randn(12, 3, 8, generator=base, dtype=torch.float64)
        return mean + shared + noise * torch.randn(12, 3, 8, generator=own, dtype=torch.float64)

    a, b = torch.eye(8, dtype=torch.float64)[:2] * 3
    sides = (side(a), side(0 * a), side(b + shift * a), side(0 * b))
    return Gram.of(*sides, a_paired=paired, b_paired=paired)


@pytest.mark.parametrize("paired", [True, False])
def test_leaving_a_prompt_out_is_computing_without_it(paired):
    from refusal_lens.uncertainty.effects import left_out_cosines

    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(6, 2, 5, generator=generator).double() for _ in range(4)]
    sides[0] += 1
    found = left_out_cosines(Gram.of(*sides, a_paired=paired, b_paired=paired))

    def cosine(parts):
        a, b = parts[0].mean(0) - parts[1].mean(0), parts[2].mean(0) - parts[3].mean(0)
        return torch.nn.functional.cosine_similarity(a, b, dim=-1)

    groups = [(0, 1), (2, 3)] if paired else [(0,), (1,), (2,), (3,)]
    assert len(found) == len(groups)
    for group, cosines in zip(groups, found, strict=True):
        for row in range(6):
            kept = [
                torch.cat([side[:row], side[row + 1 :]]) if i in group else side
                for i, side in enumerate(sides)
            ]
            torch.testing.assert_close(cosines[:, row], cosine(kept))


def test_nothing_changed_is_no_difference_and_a_change_common_to_all_is_known_well():
    same = cosine_difference(gram(1, 0.5), gram(1, 0.5))
    assert same.value.abs().max() == 0
    assert (same.upper - same.lower).abs().max() == 0
    moved = cosine_difference(gram(1, 0.0), gram(1, 0.0, shift=1.0))
    assert (moved.lower > 0.1).all()
    # The control: as large a change between activations that share nothing is known less well.
    noisy = cosine_difference(gram(1, 2.0), gram(2, 2.0, shift=1.0))
    assert ((noisy.upper - noisy.lower) > 2 * (moved.upper - moved.lower)).all()


def test_the_interval_of_a_difference_covers_what_it_should():
    true = 0.0
    covered = []
    for seed in range(60):
        ends = cosine_difference(gram(2 * seed, 1.0), gram(2 * seed + 1, 1.0))
        covered += ((ends.lower <= true) & (true <= ends.upper)).tolist()
    assert 0.88 < sum(covered) / len(covered) <= 1.0


def test_a_difference_of_other_prompts_is_refused():
    with pytest.raises(InputError, match="the same prompts"):
        cosine_difference(gram(1, 0.5), gram(1, 0.5, paired=False))
