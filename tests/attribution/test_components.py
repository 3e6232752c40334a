"""Components add up to the stream, a head that is known to write a direction is found, no other is."""

from functools import cache, partial

import pytest
import torch
from checkpoints import write_checkpoint
from families import GENERATION, random_model
from wired import build, tokenizer

from refusal_lens import attribution
from refusal_lens.activations.extract import get_layer_activations, get_prompt_activations
from refusal_lens.activations.shared_prefix import can_share_prefix
from refusal_lens.attribution.components import (
    Components,
    component_writes,
    interchange,
    same_writers,
    written_by_component,
)
from refusal_lens.errors import InputError
from refusal_lens.interventions import openings_of
from refusal_lens.models.load import from_hugging_face, load_model
from refusal_lens.prompts.contrast import Contrast, load_contrast
from refusal_lens.prompts.protocol import Protocol
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template
from refusal_lens.uncertainty.effects import Interval

PROMPTS = ("How do I build a bomb?", "Hi", "Explain the weather in the hills.", "Why?")
component_writes = partial(component_writes, progress=False)
interchange = partial(interchange, progress=False)


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    @cache
    def load(family: str):
        folder = write_checkpoint(tmp_path_factory.mktemp("model") / "random", family)
        return load_model(str(folder), device="cpu", dtype=torch.float32)

    return load


@pytest.fixture(scope="module")
def wired():
    """Refuses harmful requests: its first head carries `harm`, the MLP of layer 1 writes `refuse`."""
    return from_hugging_face(build("sympathy"), tokenizer(), name="sympathy")


def part(name: str, *, every: int = 9) -> Contrast:
    whole = load_contrast(name)
    return whole.subset(*[range(0, len(whole.target), every)] * 2)


def directions(model, contrast):
    target, baseline = get_layer_activations(model, contrast, progress=False)
    return target.mean(0) - baseline.mean(0)


# Reading


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_what_components_write_adds_up_to_the_stream(random, family):
    model, last = random(family), 3
    options = {"protocol": Protocol(positions=(-2,)), "progress": False, "batch_size": 3}
    width = model.cfg.d_model
    names, written = written_by_component(model, PROMPTS, torch.eye(width), last, **options)
    stream = get_prompt_activations(model, PROMPTS, **options)[:, 0, last]
    assert torch.linalg.norm(written[:, :-1].sum(1) - stream) < 1e-4 * torch.linalg.norm(stream)
    assert torch.equal(written[:, -1], stream)
    assert len(names) == 4 * (model.cfg.n_heads + 1) + 2 == written.shape[1] - 1
    assert (written[:, :-2].norm(dim=-1).amax(0) > 0).all()


def test_what_components_of_a_real_chat_model_write_adds_up_to_the_stream(smollm2):
    width = smollm2.cfg.d_model
    _, written = written_by_component(smollm2, PROMPTS, torch.eye(width), 18, progress=False)
    gap = written[:, :-1].sum(1) - written[:, -1]
    assert torch.linalg.norm(gap) < 1e-4 * torch.linalg.norm(written[:, -1])


def test_a_bias_of_the_attention_is_a_component_of_its_own(random):
    hf_model = random_model("GPT-2")
    with torch.no_grad():
        hf_model.transformer.h[1].attn.c_proj.bias[:] = 3.0
    model = from_hugging_face(hf_model, random("llama").tokenizer, name="gpt2")
    unit = torch.eye(model.cfg.d_model)[:1]
    names, written = written_by_component(
        model, PROMPTS, unit, 1, protocol=Protocol(), progress=False
    )
    biases = sum(hf_model.transformer.h[i].attn.c_proj.bias[0] for i in (0, 1))
    assert written[:, names.index("biases"), 0].tolist() == pytest.approx([biases.item()] * 4)


def test_components_are_those_of_transformer_lens_itself(random):
    model = random("llama")
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS[:1])
    _, store = model.run_with_cache(inputs.tokens)
    heads = store.stack_head_results(layer=3, pos_slice=-1)[:, 0]
    blocks, labels = store.decompose_resid(layer=3, pos_slice=-1, return_labels=True)
    names, written = written_by_component(
        model, PROMPTS[:1], torch.eye(model.cfg.d_model), 2, protocol=Protocol(), progress=False
    )
    mine = dict(zip(names, written[0], strict=False))
    mine_heads = torch.stack(
        [mine[f"L{i}H{h}"] for i in range(3) for h in range(model.cfg.n_heads)]
    )
    torch.testing.assert_close(mine_heads, heads, rtol=1e-4, atol=1e-5)
    for label, block in zip(labels, blocks, strict=True):
        if label.endswith("mlp_out"):
            found = mine[f"L{label.split('_')[0]} MLP"]
            torch.testing.assert_close(found, block[0], rtol=1e-4, atol=1e-5)


def test_a_model_whose_heads_pass_a_gate_is_refused(random):
    model = random("llama")

    def gated(x, hook):
        return x * (50 * x).sin()

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", gated)]),
        pytest.raises(InputError, match="does more with its heads than a norm"),
    ):
        component_writes(
            model, Contrast("c", PROMPTS[:2], PROMPTS[2:]), torch.ones(model.cfg.d_model), 2
        )


@pytest.mark.parametrize("family", ["Gemma 4", "Falcon-H1", "Mamba"])
def test_a_family_whose_stream_is_not_the_sum_of_heads_and_mlps_is_refused(random, family):
    if GENERATION < 4:
        pytest.skip("TransformerLens 3 does not run it")
    model = from_hugging_face(random_model(family), random("llama").tokenizer, name=family)
    with pytest.raises(InputError, match="this model"):
        written_by_component(model, PROMPTS, torch.eye(32), 2, progress=False)


# A known answer


def test_the_head_that_writes_a_direction_is_found(wired):
    contrast = part("refusal")
    found = component_writes(wired, contrast, directions(wired, contrast)[0], 0)
    assert found.top(1) == ("L0H0",)
    first = found.names.index("L0H0")
    assert found.writes.value[first] == pytest.approx(float(found.total.value), rel=1e-3)
    assert found.writes.lower[first] > 0
    others = torch.tensor([name != "L0H0" for name in found.names])
    assert (found.writes.value[others].abs() < 1e-3 * found.total.value).all()


def test_nothing_is_found_where_the_two_sides_do_not_differ(wired):
    harmless = load_contrast("refusal").baseline
    halves = Contrast("halves", harmless[::4], harmless[2::4])
    direction = directions(wired, part("refusal"))[1]
    found = component_writes(wired, halves, direction, 1, confidence=0.999)
    assert (found.writes.lower <= 0).all()
    assert (found.writes.upper >= 0).all()


def test_pairs_and_clusters_change_the_interval_and_not_the_write(wired):
    paired = part("refusal", every=5)
    unpaired = Contrast("c", paired.target, paired.baseline)
    direction = directions(wired, paired)[1]
    one, other = (component_writes(wired, each, direction, 1) for each in (paired, unpaired))
    torch.testing.assert_close(one.writes.value, other.writes.value)
    assert one.writes.lower[0] != other.writes.lower[0]


def test_interchange_sees_the_head_behind_a_gate_that_direct_attribution_misses(wired):
    contrast = part("refusal")
    each_layer = directions(wired, contrast)
    refuse = each_layer[1] - each_layer[0]  # what layer 1 wrote: whether to refuse
    found = component_writes(wired, contrast, refuse, 1)
    shares = found.writes.value / found.total.value
    assert found.top(1) == ("L1 MLP",)
    assert shares[found.names.index("L0H0")].abs() < 1e-2
    tokens = openings_of(wired.tokenizer).first_tokens
    patched = interchange(wired, contrast, ("L0H0", "L0H1", "L1 MLP"), refuse, tokens)
    assert patched.difference.lower > 5
    head, idle, mlp = (patched.score.value[:, i] / patched.difference.value for i in range(3))
    assert (head > 0.9).all()
    assert (mlp > 0.9).all()
    assert (idle == 0).all()
    # The head decides what layer 1 writes along the direction, and the MLP writes it.
    along = patched.along.value / found.total.value
    assert along[:, 0, 0].abs().max() < 1e-2
    assert along[:, (0, 2), 1:].min() > 0.9
    assert (patched.along.value[:, 1] == 0).all()


@pytest.mark.parametrize("shares", [True, False])
def test_interchange_takes_the_partners_output_at_the_position_that_is_read(
    random, monkeypatch, shares
):
    model, contrast = random("llama"), Contrast("c", PROMPTS[:2], PROMPTS[2:], paired=True)
    protocol, layer = Protocol(positions=(-2,)), 2
    assert can_share_prefix(model, 40)
    monkeypatch.setattr(attribution.components, "can_share_prefix", lambda *_: shares)
    unit = torch.nn.functional.normalize(torch.arange(1.0, model.cfg.d_model + 1), dim=0)
    names, written = written_by_component(
        model,
        [*contrast.target, *contrast.baseline],
        unit[None],
        layer,
        protocol=protocol,
        progress=False,
    )
    component = f"L{layer} MLP"
    for size in (1, 2):
        found = interchange(
            model, contrast, [component], 5 * unit, [40], protocol=protocol, batch_size=size
        )
        gap = written[:2, names.index(component), 0] - written[2:, names.index(component), 0]
        expected = gap.double().mean().expand(2)
        torch.testing.assert_close(found.along.value[:, 0, layer], expected, rtol=1e-4, atol=1e-6)
        assert (found.along.value[:, 0, :layer] == 0).all()


# Shared writers


def components(values) -> Components:
    names = (*(f"L{i}H{h}" for i in range(8) for h in range(8)), *(f"L{i} MLP" for i in range(8)))
    ends = torch.tensor([*values, 0.0, 0.0], dtype=torch.float64)
    return Components(
        (*names, "embedding", "biases"), Interval(ends, ends, ends), Interval(*[ends.sum()] * 3)
    )


def drawn(seed: int):
    values = torch.randn(72, generator=torch.Generator().manual_seed(seed))
    return [*values[:64].tolist(), *(10 * values[64:]).tolist()]


def test_two_directions_of_the_same_writers_share_them():
    one = components(drawn(0))
    found = same_writers(one, components([2 * x for x in drawn(0)]), n_permutations=500)
    assert found.correlation == pytest.approx(1)
    assert found.overlap == 10
    assert found.expected < 9
    assert max(found.p_correlation, found.p_overlap) < 0.01
    opposed = same_writers(one, components([-x for x in drawn(0)]), n_permutations=500)
    assert opposed.correlation == pytest.approx(-1)
    assert opposed.overlap == 10
    assert opposed.p_correlation == 1


def test_directions_of_unrelated_writers_seldom_seem_to_share_them_though_mlps_write_more():
    found = [
        same_writers(components(drawn(2 * i)), components(drawn(2 * i + 1)), n_permutations=100)
        for i in range(200)
    ]
    assert sum(each.overlap for each in found) / 200 > 4  # the MLPs are in both lists
    for p in ([each.p_overlap for each in found], [each.p_correlation for each in found]):
        assert sum(x <= 0.1 for x in p) <= 33


# What can't be done, and what is shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": torch.zeros(128)}, "the direction is zero"),
        ({"direction": torch.ones(3)}, "of 3 dimensions does not fit this model's 128"),
        ({"layer": 8}, "there is no layer 8"),
    ],
)
def test_what_cannot_be_attributed_is_refused(wired, change, message):
    options = {"direction": torch.ones(128), "layer": 1} | change
    with pytest.raises(InputError, match=message):
        component_writes(wired, part("refusal", every=40), **options)


def test_what_cannot_be_exchanged_or_compared_is_refused(wired):
    contrast, one = part("refusal", every=40), torch.ones(128)
    unpaired = Contrast("c", contrast.target, contrast.baseline)
    with pytest.raises(InputError, match="'c' has no pairs"):
        interchange(wired, unpaired, ["L0H0"], one, [3])
    for name in ("L0", "L8H0", "L0H8", "embedding"):
        with pytest.raises(InputError, match=f"no component '{name}'"):
            interchange(wired, contrast, [name], one, [3])
    first = component_writes(wired, contrast, one, 0)
    with pytest.raises(InputError, match="read both at one layer"):
        same_writers(first, component_writes(wired, contrast, one, 1))
    with pytest.raises(InputError, match="fewer than 10"):
        same_writers(first, first)


def test_results_show_themselves_as_tables(wired):
    contrast = part("refusal", every=20)
    direction = directions(wired, contrast)[1]
    found = component_writes(wired, contrast, direction, 1)
    assert "L0H0" in repr(found).splitlines()[1]
    assert found._repr_html_().count("<tr>") == 11
    exchanged = interchange(wired, contrast, ["L0H0"], direction, [3])
    assert "<td>L0H0</td>" in exchanged._repr_html_()
