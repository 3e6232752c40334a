"""The experiment end to end on the organisms: numbers, tables, files."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from checkpoints import byte_tokenizer

import refusal_lens as rl
from refusal_lens.activations import disk as artifacts
from refusal_lens.activations.progress import RunBar
from refusal_lens.errors import InputError, InterventionError
from refusal_lens.experiment import causal
from refusal_lens.experiment.config import some_prompts
from refusal_lens.experiment.measures import depth_profile
from refusal_lens.experiment.run import highlighted_layer
from refusal_lens.experiment.serialise import pack
from refusal_lens.interventions import openings_of
from refusal_lens.interventions.batched_runs import opening_log_odds
from refusal_lens.interventions.reply_openings import REFUSAL

ORGANISMS = ("specific", "entangled", "oblivious")
THINK = 30  # a token


def same(a, b):
    """Equality through dataclasses, mappings and tensors, NaN equal to NaN."""
    packed_a, tensors_a = pack(a)
    packed_b, tensors_b = pack(b)
    return packed_a == packed_b and all(
        torch.equal(tensor.nan_to_num(7.0), tensors_b[path].nan_to_num(7.0))
        for path, tensor in tensors_a.items()
    )


@pytest.mark.parametrize(
    ("n_layers", "layer"), [(32, 20), (24, 15), (80, 51), (6, 3), (1, 0), (126, 81)]
)
def test_the_default_layer_is_20_of_32_and_as_deep_elsewhere(n_layers, layer):
    found, note = highlighted_layer(None, n_layers)
    assert found == layer
    assert "layer 20" in note
    assert ("relative depth" in note) == (n_layers != 32)


def test_a_first_token_that_begins_every_reply_is_found_and_one_exception_is_enough(monkeypatch):
    model = rl.load_model("organism:specific")
    refusal = openings_of(model.tokenizer, REFUSAL)
    logits = torch.randn(200, model.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(causal, "first_token_logits", lambda *args, **options: logits)
    token_of = partial(causal.constant_token, model, [rl.load_contrast("refusal")], refusal, {})
    thinks, other, *_ = sorted({*range(60, 90)} - {*refusal.first_tokens})
    assert token_of() == ""
    logits[:, thinks] = 30
    assert token_of() == model.tokenizer.decode([thinks])
    logits[100, other] = 40
    assert token_of() == ""
    logits[:, refusal.first_tokens[0]] = 60
    assert token_of() == "", "every reply is a refusal"


def test_refusals_of_two_sets_are_alike_if_they_begin_alike_and_only_refusals_count():
    model = rl.load_model("organism:specific")
    requests = some_prompts(rl.load_contrast("refusal"), 16)
    answered = replace(requests, target=requests.baseline, baseline=requests.target)
    texts = ("I", "Sure", "First", "Here", "Start")  # with answers as a second kind of refusal
    score = openings_of(model.tokenizer, texts)
    harmful, harmless = (opening_log_odds(model, x.target, score) for x in (requests, answered))
    alike = partial(causal.words_alike, model, score=score, options={})
    assert alike([requests, requests], [harmful, harmful]) == pytest.approx(1)
    assert alike([requests, answered], [harmful, harmless]) < 0.1
    none_refused = [harmful, harmless - 1e6]
    assert math.isnan(alike([requests, answered], none_refused))


@pytest.mark.parametrize("layer", [-1, 32, 1000])
def test_a_layer_the_model_lacks_is_an_error_that_says_which_it_has(layer):
    with pytest.raises(InputError, match="out of range: this model's layers are 0 to 31"):
        highlighted_layer(layer, 32)


def test_the_numbers_are_those_of_the_parts_put_together_by_hand(quick_results):
    results = quick_results("specific")
    model = rl.load_model("organism:specific")
    refusal, negativity = results.contrasts["refusal"], results.contrasts["negativity"]
    harmful, harmless = rl.get_layer_activations(model, refusal, progress=False)
    negative, neutral = rl.get_layer_activations(model, negativity, progress=False)
    r, n = rl.mean_difference(harmful, harmless), rl.mean_difference(negative, neutral)
    by_hand = {
        "refusal_vs_negativity": torch.cosine_similarity(r, n, dim=-1),
        "mean_harmful_vs_mean_negative": torch.cosine_similarity(
            harmful.mean(0), negative.mean(0), dim=-1
        ),
        "refusal_vs_mean_negative": torch.cosine_similarity(r, negative.mean(0), dim=-1),
        "mean_negative_vs_mean_neutral": torch.cosine_similarity(
            negative.mean(0), neutral.mean(0), dim=-1
        ),
    }
    for name, expected in by_hand.items():
        torch.testing.assert_close(results.similarities[name], expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(results.norms["refusal"], r.norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_the_entangled_curve_lies_above_the_specific_one_from_layer_8_to_30(quick_results):
    specific, entangled = (
        quick_results(name).similarities["refusal_vs_negativity"] for name in ORGANISMS[:2]
    )
    assert (entangled - specific)[8:31].min() > 0


def test_a_loaded_run_is_the_saved_run(quick_results, tmp_path):
    results = quick_results("specific")
    loaded = rl.Results.load(results.save(tmp_path / "run"))
    assert same(loaded, results)
    assert str(loaded) == str(results)
    # The control: a run that differs in one number is not the same.
    other = replace(results, norms={**results.norms, "refusal": results.norms["refusal"] * 1.001})
    assert not same(loaded, other)


def test_the_folder_holds_the_files_that_are_promised(quick_results, tmp_path):
    quick_results("specific").save(tmp_path)
    promised = {
        "refusal_specificity_results.pt",
        "directions.safetensors",
        "measurements.safetensors",
        "results.json",
        "cosine_by_layer.html",
    }
    assert promised <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".partial*"))


def test_the_summary_loads_without_running_code_and_agrees_with_the_results(
    quick_results, tmp_path
):
    results = quick_results("specific")
    results.save(tmp_path)
    summary = torch.load(tmp_path / "refusal_specificity_results.pt", weights_only=True)
    assert summary["model"] == "organism:specific"
    assert summary["layer"] == 20
    for part in ("refusal", "negativity"):
        assert torch.equal(summary[f"{part}_direction"], results.directions[part])
    curve = results.similarities["refusal_vs_negativity"]
    assert torch.equal(summary["cosine_similarity"], curve)
    assert summary["refusal_vs_negativity"] == curve[20].item()
    assert sum(isinstance(value, float) for value in summary.values()) == 4


def test_results_json_holds_every_number_of_the_printed_table_and_where_it_came_from(
    quick_results, tmp_path
):
    results = quick_results("specific")
    document = json.loads((results.save(tmp_path) / "results.json").read_text())
    for (measure, value, rule), row in zip(
        results.table(), document["at_highlighted_layer"], strict=True
    ):
        assert row == {"measure": measure, "cosine": value, "published_rule": rule}
        assert f"{value:+.4f}" in str(results)
        assert measure in str(results)
    provenance = document["provenance"]
    assert provenance["model"]["model"] == "organism:specific"
    assert provenance["model"]["weights_sha256"]
    refusal = results.contrasts["refusal"]
    assert provenance["contrasts"]["refusal"]["sha256"] == refusal.sha256
    assert {"refusal_lens", "transformer_lens", "torch"} <= set(provenance["versions"])


def test_a_crash_while_saving_leaves_the_earlier_run_whole(quick_results, tmp_path, monkeypatch):
    first, second = quick_results("specific"), quick_results("entangled")
    first.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise RuntimeError("the power went")

    monkeypatch.setattr(artifacts, "write_json", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        second.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_holds_no_run_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no file"):
        rl.Results.load(tmp_path)
    (tmp_path / "results.json").write_text('{"format": 0}')
    with pytest.raises(InputError, match="not of format"):
        rl.Results.load(tmp_path)


def test_contrasts_that_share_prompts_are_refused():
    refusal = rl.load_contrast("refusal")
    negativity = rl.load_contrast("negativity")
    shared = replace(negativity, baseline=(*negativity.baseline[:-1], refusal.baseline[0]))
    with pytest.raises(InputError, match="share the prompt"):
        rl.Config(negativity=shared).contrasts()


def test_a_contrast_that_plays_two_parts_is_refused():
    with pytest.raises(InputError, match="alarm"):
        rl.Config(refusal="alarm", negativity="alarm").contrasts()
    # Of the default controls, the one that is compared with refusal is none.
    parts = [*rl.Config(negativity="alarm").contrasts()]
    assert parts == ["refusal", "negativity", "positivity", "arousal"]


def test_a_run_is_repeated_from_what_it_saved(quick_results, tmp_path):
    results = quick_results("specific")
    config = rl.config_of(results.save(tmp_path) / "results.json")
    assert config.contrasts() == results.contrasts
    assert config.protocol == results.config.protocol
    again = rl.run_experiment(config, progress=False)
    for name, values in results.similarities.items():
        torch.testing.assert_close(again.similarities[name], values, equal_nan=True)
    assert again.verdict == results.verdict


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 3}', '{"format": 3, "saved": 3}'])
def test_what_is_no_run_can_not_be_repeated(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"format|lacks"):
        rl.config_of(tmp_path)


def test_a_second_run_with_a_cache_loads_no_model(tmp_path, monkeypatch):
    quick = {"model": "organism:specific", "max_prompts": 8, "n_resamples": 400, "controls": ()}
    config = rl.Config(**quick, refusal_openings=("Sure", "Okay"))
    first = rl.run_experiment(config, progress=False, cache=tmp_path)
    assert first.causal.openings.texts == ("Okay", "Sure")
    # The openings decide what a refusal is: here, an answer.
    assert first.verdict.evidence.refused_harmless > first.verdict.evidence.refused_harmful
    monkeypatch.setattr(
        "refusal_lens.experiment.cached_model.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    second = rl.run_experiment(config, progress=False, cache=tmp_path)
    assert same(first, second)
    # The control: effects on other openings are not the stored ones.
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        rl.run_experiment(rl.Config(**quick), progress=False, cache=tmp_path)


def test_one_bar_names_every_step_of_a_run_and_counts_over_all_of_them(capsys, monkeypatch):
    model = rl.load_model("organism:oblivious")
    few = {"max_prompts": 4, "n_resamples": 400, "controls": ()}
    counted, update = [], RunBar.update
    monkeypatch.setattr(RunBar, "update", lambda bar, n=1: counted.append(n) or update(bar, n))
    capsys.readouterr()
    rl.run_experiment("organism:oblivious", model=model, **few)
    lines = re.findall(r"([^\r\n]*?): +\d+%.*?(\d+)/(\d+) prompt runs", capsys.readouterr().err)
    steps = ["reading prompts", "scoring requests"]
    steps += [f"ablating {name}, every layer" for name in ("refusal", "negativity")]
    steps += ["ablation", "addition", "scoring replies", "statistics"]
    assert [*dict.fromkeys(step for step, *_ in lines)] == steps
    assert len({total for *_, total in lines}) == 1
    assert min(counted) >= 0, "no step counts more than it announced"
    assert lines[-1][1] == lines[-1][2]
    rl.get_layer_activations(model, rl.Contrast("few", ["a"], ["b"]))
    assert "prompts read: 100%" in capsys.readouterr().err, "a function of its own has its own bar"


def test_a_model_handed_over_is_used_and_left_as_it_was(quick_results):
    model = rl.load_model("organism:specific")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = rl.Config(controls=(), max_prompts=32, n_resamples=1000)
    results = rl.run_experiment(config, model=model, progress=False)
    torch.testing.assert_close(
        results.similarities["refusal_vs_negativity"],
        quick_results("specific").similarities["refusal_vs_negativity"],
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_html_of_results_escapes_what_came_from_outside(quick_results):
    results = quick_results("specific")
    hostile = replace(
        results,
        provenance={**results.provenance, "model": {"model": "<script>alert(1)</script>"}},
    )
    assert "<script>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()


def test_a_profile_needs_no_controls():
    rows = torch.randn(4, 3, 8)
    sides = {"refusal": (rows, -rows), "negativity": (rows + 1, rows - 1)}
    directions = {part: rl.mean_difference(*pair) for part, pair in sides.items()}
    sides = {part: rl.ContrastActivations(*pair) for part, pair in sides.items()}
    assert list(depth_profile(sides, directions)) == [
        "refusal_vs_negativity",
        "mean_harmful_vs_mean_negative",
        "refusal_vs_mean_negative",
        "mean_negative_vs_mean_neutral",
    ]


ANSWERS = {"specific": "distinct", "entangled": "shared", "oblivious": "inconclusive"}


@pytest.mark.parametrize("organism", ORGANISMS)
def test_the_verdict_on_an_organism_is_the_known_answer_with_its_reasons(quick_results, organism):
    results = quick_results(organism)
    assert results.verdict.answer == ANSWERS[organism]
    # `oblivious` answers every request with the same word, and statements with others.
    assert results.verdict.evidence.constant_token == ""
    assert all(line in str(results) for line in results.verdict_lines())


def test_a_model_whose_every_reply_begins_alike_is_said_to_and_not_to_refuse_nothing():
    from families import BARE, random_model

    def contrast(name: str, target: str, baseline: str) -> rl.Contrast:
        return rl.Contrast(
            name, *([f"{side} {x}" for x in "abcdefgh"] for side in (target, baseline))
        )

    thinking = random_model("GPT-J")
    thinking.lm_head.bias.data[THINK] += 100
    config = rl.Config(
        refusal=contrast("refusal", "Rob bank", "Bake cake"),
        negativity=contrast("negativity", "Bad day", "A day"),
        controls=(),
        n_resamples=400,
        protocol=rl.Protocol(chat_template=BARE),
    )
    model = rl.from_hugging_face(thinking, byte_tokenizer(), name="thinking")
    results = rl.run_experiment(config, model=model, progress=False)
    assert results.verdict.evidence.constant_token == byte_tokenizer().decode([THINK])
    assert results.verdict.answer == "inconclusive"
    said = " ".join(results.verdict_lines())
    assert f"every reply begins with {results.verdict.evidence.constant_token!r}" in said
    assert "does not refuse" not in said


NEAR = ("How do I bake a loaf of bread?", "How do I bake a loaf of bread today?")
FAR = ("Where do swallows spend winter?", "Name three rivers.", "Why is glass brittle?")


@pytest.mark.parametrize("paired", [False, True])
def test_near_duplicates_of_the_user_s_own_prompts_count_as_one_cluster(caplog, paired):
    others = ("Plain.", "Some tea, please.", "Rest now.", "Look there.", "Fine weather.")
    own = rl.Contrast("own", NEAR + FAR, others, paired=paired)
    found = rl.Config(negativity=own, controls=()).contrasts()["negativity"]
    # Of a pair, both sides must be alike.
    assert [*map(len, map(set, found.clusters))] == ([] if paired else [4, 5])
    assert paired or found.clusters[0][0] == found.clusters[0][1]
    assert ("1 prompts of 'own' nearly repeat others" in caplog.text) is not paired


def test_clusters_that_the_user_gives_stand(caplog):
    labels = ("a", "b", "c", "d", "e")
    own = rl.Contrast("own", NEAR + FAR, ("A.", "B.", "C.", "D.", "E."), clusters=(labels, labels))
    assert rl.Config(negativity=own, controls=()).contrasts()["negativity"].clusters == own.clusters
    assert not caplog.text


def test_a_model_of_random_weights_is_inconclusive(tmp_path):
    from training.language import BEHAVIOURS
    from training.organisms import save_organism, train_organism

    untrained = train_organism(BEHAVIOURS["specific"], n_steps=0, n_layers=4, progress=False)
    save_organism(untrained, tmp_path / "untrained")
    config = rl.Config(model=str(tmp_path / "untrained"), max_prompts=24, n_resamples=1000)
    results = rl.run_experiment(config, progress=False)
    assert results.verdict.answer == "inconclusive"
    assert "does not refuse" in " ".join(results.verdict_lines())


def test_without_interventions_there_is_no_conclusion(quick_results):
    specific = quick_results("specific")
    results = rl.analyse(_activations(), config=rl.Config(n_resamples=1000, layer=1))
    assert results.verdict.answer == "inconclusive"
    assert results.verdict.reasons[-1].finding == "not measured"
    assert results.causal is None
    assert "causal inner product" not in results.metrics
    assert "causal inner product" in specific.metrics  # the control: with a model it is there


def _activations(n=24, layers=3, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, n, layers, width, generator=generator)
    rows[0, ..., 0] += 3
    rows[2, ..., :2] += 3
    return {"refusal": (rows[0], rows[1]), "negativity": (rows[2], rows[3])}


def test_contrasts_may_come_in_another_order_than_the_activations(quick_results):
    given = quick_results("specific").contrasts
    parts = ("negativity", "refusal")
    rows = {part: (torch.randn(32, 2, 8), torch.randn(32, 2, 8)) for part in parts}
    contrasts = {part: given[part] for part in parts}
    config = rl.Config(n_resamples=400, layer=1)
    analysed = rl.analyse(rows, config=config, contrasts=contrasts)
    assert [*analysed.contrasts] == ["refusal", "negativity"]


def test_interventions_of_another_layer_are_no_evidence(quick_results):
    results = quick_results("specific")
    rows = {
        part: (torch.randn(32, 32, 8), torch.randn(32, 32, 8)) for part in ("refusal", "negativity")
    }
    with pytest.raises(InputError, match="interventions are of layer 20, not 3"):
        rl.analyse(rows, config=rl.Config(n_resamples=400, layer=3), causal=results.causal)


def test_activations_of_any_source_are_analysed_without_a_model(tmp_path):
    results = rl.analyse(_activations(), config=rl.Config(n_resamples=1000, layer=1))
    directions = {k: rl.mean_difference(*v) for k, v in _activations().items()}
    expected = rl.cosine_similarity(directions["refusal"], directions["negativity"])
    torch.testing.assert_close(results.similarities["refusal_vs_negativity"], expected)
    assert same(rl.Results.load(results.save(tmp_path)), results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"refusal": a["refusal"]}, "lack 'negativity'"),
        (lambda a: a | {"refusal": (a["refusal"][0][0], a["refusal"][1])}, "has shape"),
        (lambda a: a | {"refusal": tuple(s[:, :2] for s in a["refusal"])}, "differ in"),
        (lambda a: a | {"refusal": tuple(s[..., :4] for s in a["refusal"])}, "differ in"),
        (
            lambda a: a | {"refusal": tuple(s * float("nan") for s in a["refusal"])},
            "NaN or an infinity",
        ),
    ],
)
def test_activations_that_can_not_be_analysed_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        rl.analyse(change(_activations()), config=rl.Config(n_resamples=1000, layer=1))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_prompts_give_reasons_and_no_conclusion(n):
    results = rl.analyse(_activations(n), config=rl.Config(n_resamples=1000, layer=1))
    sure = results.statistics["negativity"]
    assert (sure.unbiased.isnan() == torch.tensor([bool(why) for why in sure.reasons])).all()
    if n < 4:
        assert sure.unbiased.isnan().all()
        assert "too few" in results.why_unknown(1)
    assert results.verdict.answer == "inconclusive"
    assert results.verdict.reasons[0].measure == "n_prompts"
    assert str(results)


def test_identical_activations_have_no_direction_and_say_so():
    rows = torch.randn(1, 3, 12).expand(24, 3, 12)
    results = rl.analyse(
        _activations() | {"refusal": (rows, rows)}, config=rl.Config(n_resamples=1000, layer=1)
    )
    assert results.similarities["refusal_vs_negativity"].isnan().all()
    assert results.statistics["negativity"].unbiased.isnan().all()
    assert "same activation" in results.why_unknown(1)


def test_a_model_that_can_not_be_intervened_with_is_read_and_what_is_missing_is_said(monkeypatch):
    def refuse(model):
        raise InterventionError("an ablated direction is found again at blocks.3.mlp.hook_in")

    monkeypatch.setattr("refusal_lens.interventions.batched_runs.check_interventions", refuse)
    config = rl.Config(model="organism:oblivious", max_prompts=8, n_resamples=400, controls=())
    results = rl.run_experiment(config, progress=False)
    assert results.causal is None
    assert results.verdict.answer == "inconclusive"
    assert "found again at blocks.3" in results.verdict_lines()[0]
    assert results.similarities["refusal_vs_negativity"].isfinite().any()
