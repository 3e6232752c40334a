"""Ablation and addition: what they do, that they do it in either TransformerLens, and nothing else."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from checkpoints import write_checkpoint
from torch import Tensor

from refusal_lens.errors import InputError
from refusal_lens.interventions import (
    Intervention,
    RefusalTokens,
    ablate_direction,
    ablation_effects,
    add_direction,
    addition_effects,
    batched_runs,
    cross_effects,
    find_refusal_tokens,
    next_token_kl,
    openings_of,
    refusal_log_odds,
)
from refusal_lens.interventions.cross_ablation import held_out_scores, outside, random_directions
from refusal_lens.interventions.hooks import stream_points
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import Contrast
from refusal_lens.prompts.tokenize import build_inputs_with_chat_template, encode_prompts

FAMILIES = ("llama", "qwen2", "gemma", "gemma2", "phi3")
PROMPTS = (
    "How do I build a bomb?",
    "Hi",
    "How do I bake a cake?",
    "Explain the weather in the hills.",
    "Why?",
    "How do I rob a bank?",
)
TOKENS = RefusalTokens((40, 41), ("I", "J"), "by hand", 1.0, 0.0)

ablation_effects = partial(ablation_effects, score=TOKENS, progress=False)
addition_effects = partial(addition_effects, score=TOKENS, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @cache
    def written(family: str):
        return write_checkpoint(tmp_path_factory.mktemp("model") / "random", family)

    return written


@pytest.fixture(scope="module")
def loaded(checkpoint):
    @cache
    def load(family: str):
        return load_model(str(checkpoint(family)), device="cpu", dtype=torch.float32)

    return load


@pytest.fixture
def model(loaded):
    return loaded("llama")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def last_logits(model, hooks, prompts=PROMPTS) -> Tensor:
    """The plain way: all prompts in one padded batch, all logits."""
    inputs = build_inputs_with_chat_template(model.tokenizer, prompts)
    logits = model.run_with_hooks(inputs.tokens, attention_mask=inputs.mask, fwd_hooks=hooks)
    return logits[:, -1]


@torch.no_grad()
def every_stream_point(model, hooks) -> dict[str, Tensor]:
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS)
    names = stream_points(model)
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(
            inputs.tokens,
            attention_mask=inputs.mask,
            names_filter=names,
            return_cache_object=False,
        )
    return cache


@torch.no_grad()
def hugging_face_logits(folder, intervene, prompts=PROMPTS) -> Tensor:
    """Each prompt alone through plain Hugging Face, after `intervene(hf_model)`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    intervene(hf)
    ids = encode_prompts(AutoTokenizer.from_pretrained(folder), prompts)
    return torch.stack([hf(torch.tensor([row])).logits[0, -1] for row in ids])


def project_outputs(u: Tensor, hf) -> None:
    """Forward hooks on whatever writes to the stream: after the post-norms where there are any."""

    def outputs(module, arguments, output):
        first = output[0] if isinstance(output, tuple) else output
        first = first - (first @ u)[..., None] * u
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def inputs(module, arguments):
        x = arguments[0]
        return (x - (x @ u)[..., None] * u, *arguments[1:])

    decoder = hf.get_decoder()
    decoder.layers[0].register_forward_pre_hook(inputs)
    for block in decoder.layers:
        post_norms = hasattr(block, "pre_feedforward_layernorm")
        attention = block.post_attention_layernorm if post_norms else block.self_attn
        mlp = block.post_feedforward_layernorm if post_norms else block.mlp
        attention.register_forward_hook(outputs)
        mlp.register_forward_hook(outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_ablation_the_stream_has_no_component_along_the_direction(loaded, family):
    model, direction = loaded(family), drawn(32)
    unit = direction / direction.norm()
    before, after = (every_stream_point(model, h) for h in ([], ablate_direction(model, direction)))
    assert min((x @ unit).abs().max() for x in before.values()) > 0.05
    for name, x in after.items():
        assert (x @ unit).abs().max() < 1e-5 * max(1.0, x.norm(dim=-1).max()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_equals_plain_hugging_face_with_forward_hooks(loaded, checkpoint, family):
    direction = drawn(32)
    unit = direction / direction.norm()
    expected = hugging_face_logits(checkpoint(family), partial(project_outputs, unit))
    unchanged = hugging_face_logits(checkpoint(family), lambda hf: None)
    model = loaded(family)
    torch.testing.assert_close(
        last_logits(model, ablate_direction(model, direction)), expected, atol=1e-4, rtol=1e-4
    )
    assert (expected - unchanged).abs().max() > 0.01


def test_ablation_equals_projecting_the_weights_that_write(loaded, checkpoint):
    direction = drawn(32)
    unit = direction / direction.norm()

    def orthogonalise(hf):
        hf.model.embed_tokens.weight.sub_(hf.model.embed_tokens.weight @ unit[:, None] * unit)
        for block in hf.model.layers:
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.weight.sub_(unit[:, None] * (unit @ layer.weight))

    expected = hugging_face_logits(checkpoint("llama"), torch.no_grad()(orthogonalise))
    model = loaded("llama")
    torch.testing.assert_close(
        last_logits(model, ablate_direction(model, direction)), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("layer", [-1, 0, 2, 3])
def test_addition_equals_plain_hugging_face_adding_at_the_next_block_or_norm(
    loaded, checkpoint, layer
):
    direction = drawn(32)

    def add(hf):
        decoder = hf.get_decoder()
        following = [*decoder.layers, decoder.norm][layer + 1]
        following.register_forward_pre_hook(lambda _, xs: (xs[0] + direction, *xs[1:]))

    expected = hugging_face_logits(checkpoint("gemma2"), add)
    model = loaded("gemma2")
    torch.testing.assert_close(
        last_logits(model, add_direction(model, direction, layer)), expected, atol=1e-4, rtol=1e-4
    )


def test_ablation_is_idempotent_and_blind_to_sign_and_scale(model):
    direction = drawn(32)
    once = last_logits(model, ablate_direction(model, direction))
    twice = ablate_direction(model, direction) + ablate_direction(model, direction)
    torch.testing.assert_close(last_logits(model, twice), once, atol=1e-5, rtol=1e-5)
    for scale in (-1.0, 1e-12, 1e12):
        again = last_logits(model, ablate_direction(model, scale * direction))
        torch.testing.assert_close(again, once, atol=1e-5, rtol=1e-5)
    assert (
        once - last_logits(model, ablate_direction(model, drawn(32, seed=1)))
    ).abs().max() > 0.01


def test_adding_a_direction_and_its_opposite_is_adding_nothing(model):
    direction = drawn(32)
    there = add_direction(model, direction, 1)
    back = add_direction(model, -direction, 1)
    nothing = last_logits(model, [])
    torch.testing.assert_close(last_logits(model, there + back), nothing, atol=1e-4, rtol=1e-4)
    assert (last_logits(model, there) - nothing).abs().max() > 0.01


def test_each_row_can_have_its_own_direction(model):
    directions = drawn(len(PROMPTS), 32)
    together = last_logits(model, ablate_direction(model, directions))
    alone = last_logits(model, ablate_direction(model, directions[3]))
    torch.testing.assert_close(together[3], alone[3], atol=1e-5, rtol=1e-5)
    assert (together[2] - alone[2]).abs().max() > 0.01


def test_hooks_do_not_write_into_their_input(model):
    x = drawn(2, 3, 32).requires_grad_()
    kept = x.detach().clone()
    for hooks in (ablate_direction(model, drawn(32)), add_direction(model, drawn(32), 0)):
        for _, hook in hooks:
            assert hook(x, hook=None).data_ptr() != x.data_ptr()
            torch.testing.assert_close(x.detach(), kept, atol=0, rtol=0)


def test_hooks_keep_the_dtype_of_the_stream(model):
    x = drawn(2, 3, 32).bfloat16()
    for hooks in (ablate_direction(model, drawn(32)), add_direction(model, drawn(32), 0)):
        assert hooks[0][1](x, hook=None).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "intervene", [ablate_direction, partial(add_direction, layer=0)], ids=["ablate", "add"]
)
def test_a_direction_that_cannot_be_one_is_refused(model, intervene):
    with pytest.raises(InputError, match="zero"):
        intervene(model, torch.zeros(32))
    with pytest.raises(InputError, match="NaN or infinite"):
        intervene(model, drawn(32) / 0)
    with pytest.raises(InputError, match="another model"):
        intervene(model, drawn(31))


@pytest.mark.parametrize("layer", [-2, 4])
def test_a_layer_that_is_not_there_is_refused(model, layer):
    with pytest.raises(InputError, match=f"no layer {layer}"):
        add_direction(model, drawn(32), layer)
    with pytest.raises(InputError, match=f"no layer {layer}"):
        addition_effects(model, PROMPTS, drawn(1, 32), torch.tensor([layer]))
    with pytest.raises(InputError, match=f"no layer {layer}"):  # though nothing would be added
        addition_effects(model, PROMPTS, torch.zeros(1, 32), torch.tensor([layer]))


# Many at once


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_many_ablations_at_once_equal_one_at_a_time(loaded, family, batch_size):
    model, directions = loaded(family), drawn(5, 32)
    effects = ablation_effects(model, PROMPTS, directions, batch_size=batch_size)
    unchanged = last_logits(model, [])
    torch.testing.assert_close(
        effects.unchanged, refusal_log_odds(unchanged, TOKENS), atol=1e-4, rtol=0
    )
    for i, direction in enumerate(directions):
        logits = last_logits(model, ablate_direction(model, direction))
        odds, kl = refusal_log_odds(logits, TOKENS), next_token_kl(unchanged, logits)
        torch.testing.assert_close(effects.log_odds[i], odds, atol=1e-4, rtol=0)
        torch.testing.assert_close(effects.kl[i], kl, atol=1e-4, rtol=0)
    assert effects.log_odds.std(0).min() > 1e-3
    assert effects.kl.min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_many_additions_at_once_equal_one_at_a_time(loaded, family, batch_size):
    model, directions = loaded(family), drawn(6, 32)
    layers = torch.tensor([2, 0, -1, 3, 2, 1])
    effects = addition_effects(model, PROMPTS, directions, layers, batch_size=batch_size)
    unchanged = last_logits(model, [])
    for i, (direction, layer) in enumerate(zip(directions, layers.tolist(), strict=True)):
        logits = last_logits(model, add_direction(model, direction, layer))
        odds, kl = refusal_log_odds(logits, TOKENS), next_token_kl(unchanged, logits)
        torch.testing.assert_close(effects.log_odds[i], odds, atol=1e-4, rtol=0)
        torch.testing.assert_close(effects.kl[i], kl, atol=1e-4, rtol=0)
    assert effects.log_odds.std(0).min() > 1e-3


def test_prompts_that_share_nothing_and_a_single_prompt_give_the_same(model, monkeypatch):
    directions = drawn(3, 32)
    together = ablation_effects(model, PROMPTS, directions)
    alone = [ablation_effects(model, [prompt], directions).log_odds for prompt in PROMPTS]
    torch.testing.assert_close(torch.cat(alone, -1), together.log_odds, atol=1e-4, rtol=0)
    monkeypatch.setattr(batched_runs, "can_share_prefix", lambda *_: False)
    apart = addition_effects(model, PROMPTS, directions, torch.tensor([0, 1, 2]))
    monkeypatch.undo()
    shared = addition_effects(model, PROMPTS, directions, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(apart.log_odds, shared.log_odds, atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_no_run_holds_more_rows_than_the_batch_size(model, batch_size):
    sizes = []
    ablations = batched_runs.Interventions(drawn(9, 32))
    for outcome in batched_runs.run_interventions(
        model, PROMPTS * 3, ablations, batch_size=batch_size, progress=False
    ):
        sizes.append(len(outcome.prompts) * (1 + len(outcome.interventions)))
    assert max(sizes) <= max(2, batch_size)


def test_effects_have_the_shape_of_the_directions(model):
    directions = drawn(2, 4, 32)
    effects = addition_effects(model, PROMPTS, directions, torch.arange(4))
    assert effects.log_odds.shape == effects.kl.shape == (2, 4, len(PROMPTS))
    flat = addition_effects(model, PROMPTS, directions[1], torch.arange(4))
    torch.testing.assert_close(effects.log_odds[1], flat.log_odds, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="one layer to each"):
        addition_effects(model, PROMPTS, directions, torch.arange(3))


def test_no_direction_has_no_number_and_a_zero_one_no_effect(model):
    directions = drawn(3, 32)
    directions[0], directions[1] = torch.nan, 0.0
    effects = ablation_effects(model, PROMPTS, directions)
    assert effects.log_odds[0].isnan().all()
    assert effects.kl[0].isnan().all()
    torch.testing.assert_close(effects.log_odds[1], effects.unchanged, atol=1e-5, rtol=0)
    assert effects.kl[1].max() < 1e-6 < effects.kl[2].min()


def test_the_model_is_left_as_it_was_found(model):
    weights = deepcopy(dict(model.named_parameters()))
    model.train()
    before = torch.random.get_rng_state()
    ablation_effects(model, PROMPTS, drawn(2, 32))
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    model.eval()
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    for name, weight in model.named_parameters():
        assert weight.grad is None
        assert weight.requires_grad == weights[name].requires_grad
        assert torch.equal(weight, weights[name])


def test_the_model_is_left_as_it_was_found_by_a_run_that_fails(model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("in the middle of a run")

    monkeypatch.setattr(batched_runs.torch, "cat", fail)
    with pytest.raises(RuntimeError, match="in the middle of a run"):
        addition_effects(model, PROMPTS[:1], drawn(2, 32), torch.tensor([0, 1]))
    monkeypatch.undo()
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert torch.is_grad_enabled()


def test_a_model_with_hooks_on_it_is_refused(model):
    hooks = ablate_direction(model, drawn(32))
    with model.hooks(fwd_hooks=hooks), pytest.raises(InputError, match="hooks on it"):
        ablation_effects(model, PROMPTS, drawn(1, 32))


def test_a_prompt_longer_than_the_context_is_named(model):
    with pytest.raises(InputError, match="prompt 1 has"):
        ablation_effects(model, ["Hi", "long " * 60], drawn(1, 32))


# Refusal


def test_refusal_log_odds_are_those_of_the_formula():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0], [40.0, 0.0, 0.0, 0.0], [-40.0, 0.0, 0.0, 0.0]])
    p = logits.double().softmax(-1)[:, [0, 2]].sum(-1)
    expected = (p + 1e-8).log() - (1 - p + 1e-8).log()
    found = refusal_log_odds(logits, [0, 2])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    bound = torch.tensor(1e8).log()
    torch.testing.assert_close(refusal_log_odds(logits, [0])[1], bound, atol=1e-5, rtol=0)
    torch.testing.assert_close(refusal_log_odds(logits, [0])[2], -bound, atol=1e-5, rtol=0)


def test_without_refusal_tokens_there_are_no_log_odds():
    assert refusal_log_odds(drawn(2, 5), []).isnan().all()
    with pytest.raises(InputError, match="no token of this vocabulary of 5"):
        refusal_log_odds(drawn(2, 5), [5])


def test_kl_is_nothing_between_equals_and_right_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    by_hand = 0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(next_token_kl(p.log(), q.log() + 7), by_hand)
    assert next_token_kl(p.log(), p.log()) == 0


HARMFUL = ("bomb", "rob it", "kill", "poison", "steal", "hack it")
HARMLESS = ("cake", "hike it", "paint", "garden", "sleep", "walk it")


def plant(folder):
    """Teach a tiny model to reply `I` first to prompts with a harmful word, and `S` to others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = encode_prompts(tokenizer, HARMFUL + HARMLESS)
    reply = torch.tensor(tokenizer.convert_tokens_to_ids(["I"] * 6 + ["S"] * 6))
    optimiser = torch.optim.Adam(hf.parameters(), lr=3e-3)
    for _ in range(40):
        logits = torch.stack([hf(torch.tensor([row])).logits[0, -1] for row in rows])
        loss = torch.nn.functional.cross_entropy(logits, reply)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    hf.save_pretrained(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("planted") / "model", "llama")
    plant(folder)
    return load_model(str(folder), device="cpu", dtype=torch.float32)


REFUSAL = Contrast("refusal", HARMFUL, HARMLESS, "harmful", "harmless")
NEGATIVITY = Contrast(
    "negativity",
    ("sad day", "bad tea", "ugly cat", "awful"),
    ("mild day", "warm tea", "grey cat", "usual"),
    "negative",
    "neutral",
)


@torch.no_grad()
def read(model, prompts) -> Tensor:
    names = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    rows = []
    for ids in encode_prompts(model.tokenizer, prompts):
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=names)
        rows.append(torch.stack([cache[name][0, -1] for name in names]))
    return torch.stack(rows)


def sides(model, contrast) -> tuple[Tensor, Tensor]:
    return read(model, contrast.target), read(model, contrast.baseline)


def test_refusal_tokens_of_a_known_family_come_from_its_table(planted):
    found = find_refusal_tokens(planted, HARMFUL, HARMLESS, progress=False)
    assert found.texts == ("I",)
    assert "<|start_header_id|>" in found.how
    assert found.refused > 0.9
    assert found.answered < 0.1


def test_refusal_tokens_of_an_unknown_family_are_found_in_what_it_does(planted, monkeypatch):
    monkeypatch.setattr("refusal_lens.interventions.refusal_metric.FIRST_WORDS", {})
    found = find_refusal_tokens(planted, HARMFUL, HARMLESS, progress=False)
    assert found.texts == ("I",)
    assert found.refused - found.answered > 0.9
    swapped = find_refusal_tokens(planted, HARMLESS, HARMFUL, progress=False)
    assert swapped.texts == ("S",)


def test_a_model_that_does_not_refuse_is_said_not_to(model, monkeypatch):
    in_table = find_refusal_tokens(model, HARMFUL, HARMLESS, progress=False)
    assert abs(in_table.refused - in_table.answered) < 0.05
    monkeypatch.setattr("refusal_lens.interventions.refusal_metric.FIRST_WORDS", {})
    found = find_refusal_tokens(model, HARMFUL, HARMLESS, min_separation=0.3, progress=False)
    assert found.ids == ()
    assert found.how.startswith("none")
    assert found.refused == found.answered == 0
    assert refusal_log_odds(drawn(3), found).isnan()


def test_too_few_prompts_to_find_refusal_tokens_are_refused(model):
    with pytest.raises(InputError, match="at least two"):
        find_refusal_tokens(model, HARMFUL[:1], HARMLESS, progress=False)


def test_ablating_the_direction_of_a_planted_refusal_lowers_it_and_a_random_one_does_not(planted):
    tokens = find_refusal_tokens(planted, HARMFUL, HARMLESS, progress=False)
    target, baseline = sides(planted, REFUSAL)
    layer = planted.cfg.n_layers - 1
    direction = (target.mean(0) - baseline.mean(0))[layer]
    candidates = torch.cat([direction[None], drawn(20, 32)])
    effects = ablation_effects(planted, HARMFUL, candidates, score=tokens)
    change = (effects.log_odds - effects.unchanged).mean(-1)
    assert change[0] < -2
    assert change[0] < 2 * change[1:].min()
    added = addition_effects(
        planted, HARMLESS, direction[None], torch.tensor([layer]), score=tokens
    )
    assert (added.log_odds - added.unchanged).min() > 4


def planted_effects(model, contrasts, activations, **options):
    """Cross effects with two random directions; the refusal tokens; the random directions."""
    classes = [side[:, options["layer"]] for pair in activations for side in pair]
    random = random_directions(*classes, n=2, generator=torch.Generator().manual_seed(0))
    tokens = find_refusal_tokens(model, HARMFUL, HARMLESS, progress=False)
    options |= {"random": random, "score": tokens, "progress": False}
    return cross_effects(model, contrasts, activations, **options), tokens, random


def at_the_last_token(hooks):
    """The hooks, which change the last position alone."""

    def only(change):
        return lambda x, hook: torch.cat([x[:, :-1], change(x[:, -1:], hook)], dim=1)

    return [(name, only(change)) for name, change in hooks]


def every_direction(activations, random):
    """The directions of the cross effects by the names of their interventions."""
    refusal, negativity = ((t.mean(0) - b.mean(0))[1] for t, b in activations)
    axes = [x / x.norm() for x in (refusal, negativity)]
    return {
        Intervention.REFUSAL: refusal,
        Intervention.NEGATIVITY: negativity,
        Intervention.REFUSAL_ALONE: refusal - (refusal @ axes[1]) * axes[1],
        Intervention.NEGATIVITY_ALONE: negativity - (negativity @ axes[0]) * axes[0],
        Intervention.RANDOM: random[1] * negativity.norm() / random[1].norm(),
    }


def every_side(effects):
    """The prompts of the four sets, their refusal log-odds, and the number of their contrast."""
    return (
        (HARMFUL, effects.refusal.target_log_odds, 0),
        (HARMLESS, effects.refusal.baseline_log_odds, 0),
        (NEGATIVITY.target, effects.negativity.target_log_odds, 1),
        (NEGATIVITY.baseline, effects.negativity.baseline_log_odds, 1),
    )


def as_alone(model, hooks, prompts, tokens, found):
    expected = refusal_log_odds(last_logits(model, hooks, prompts), tokens)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def planted_ablations(model):
    """Activations, ablations of the directions of layer 1, refusal tokens, and the directions."""
    activations = sides(model, REFUSAL), sides(model, NEGATIVITY)
    pair, options = (REFUSAL, NEGATIVITY), {"intervention": "ablation", "layer": 1}
    effects, tokens, random = planted_effects(model, pair, activations, **options)
    return activations, effects, tokens, every_direction(activations, random)


def test_cross_ablations_set_each_contrasts_prompts_to_its_own_baseline(planted):
    activations, effects, tokens, directions = planted_ablations(planted)
    for prompts, found, contrast in every_side(effects):
        as_alone(planted, [], prompts, tokens, found[0])
        for intervention, direction in directions.items():
            row = effects.rows(intervention)[-1]
            random = intervention is Intervention.RANDOM
            ran = (HARMFUL, NEGATIVITY.target) if random else (prompts,)
            if prompts not in ran or (contrast and "without" in intervention):
                assert found[row].isnan().all()
                continue
            references = activations[contrast][1].mean(0) @ direction / direction.norm()
            hooks = at_the_last_token(ablate_direction(planted, direction, references))
            as_alone(planted, hooks, prompts, tokens, found[row])


def test_removals_of_the_whole_component_act_on_every_token_of_requests(planted):
    _, effects, tokens, directions = planted_ablations(planted)
    for name in ("REFUSAL", "NEGATIVITY"):
        [row] = effects.rows(Intervention[f"{name}_TO_ZERO"])
        hooks = ablate_direction(planted, directions[Intervention[name]])
        for prompts, found, contrast in every_side(effects):
            if contrast:  # statements
                assert found[row].isnan().all()
                continue
            as_alone(planted, hooks, prompts, tokens, found[row])
            last = refusal_log_odds(last_logits(planted, at_the_last_token(hooks), prompts), tokens)
            assert (found[row] - last).abs().max() > 0.01  # the control: every token matters


def test_cross_additions_add_at_the_last_token_of_requests_and_nothing_to_zero(planted):
    activations = sides(planted, REFUSAL), sides(planted, NEGATIVITY)
    pair, options = (REFUSAL, NEGATIVITY), {"intervention": "addition", "layer": 1}
    effects, tokens, random = planted_effects(planted, pair, activations, **options)
    directions = every_direction(activations, random)
    for prompts, found, contrast in every_side(effects):
        if contrast:
            assert found.isnan().all()
            continue
        for intervention in (Intervention.REFUSAL_TO_ZERO, Intervention.NEGATIVITY_TO_ZERO):
            assert found[effects.rows(intervention)].isnan().all()
        for intervention, direction in directions.items():
            row = effects.rows(intervention)[-1]
            if intervention is Intervention.RANDOM and prompts != HARMLESS:
                assert found[row].isnan().all()
                continue
            hooks = at_the_last_token(add_direction(planted, direction, 1))
            as_alone(planted, hooks, prompts, tokens, found[row])


def test_ablations_at_every_token_are_affine_and_of_harmful_requests_alone(planted):
    activations, effects, tokens, directions = planted_ablations(planted)
    for name in ("REFUSAL", "NEGATIVITY"):
        [row] = effects.rows(Intervention[f"{name}_EVERYWHERE"])
        direction = directions[Intervention[name]]
        references = activations[0][1].mean(0) @ direction / direction.norm()
        hooks = ablate_direction(planted, direction, references)
        for prompts, found, _ in every_side(effects):
            if prompts == HARMFUL:
                as_alone(planted, hooks, prompts, tokens, found[row])
            else:
                assert found[row].isnan().all()


def test_a_resampled_component_is_that_of_one_harmless_prompt_for_each_harmful_one(planted):
    activations, effects, tokens, directions = planted_ablations(planted)
    for name in ("REFUSAL", "NEGATIVITY"):
        [row] = effects.rows(Intervention[f"{name}_RESAMPLED"])
        direction = directions[Intervention[name]]
        components = activations[0][1] @ direction / direction.norm()
        for prompts, found, _ in every_side(effects):
            if prompts != HARMFUL:
                assert found[row].isnan().all()
                continue
            for i, prompt in enumerate(prompts):
                hooks = at_the_last_token(ablate_direction(planted, direction, components[i]))
                as_alone(planted, hooks, [prompt], tokens, found[row, i : i + 1])
        [affine] = effects.rows(Intervention[name])
        both = effects.refusal.target_log_odds
        assert (both[row] - both[affine]).abs().max() > 0.01  # a prompt is not the mean


def test_negativity_is_ablated_and_added_without_what_is_taken_out(planted):
    activations = sides(planted, REFUSAL), sides(planted, NEGATIVITY)
    spans = [drawn(1, 32, seed=5), drawn(3, 32, seed=6)]
    negativity = (activations[1][0].mean(0) - activations[1][1].mean(0))[1]
    options = {"intervention": "addition", "layer": 1, "taken_out": spans}
    effects, tokens, _ = planted_effects(planted, (REFUSAL, NEGATIVITY), activations, **options)
    for part, span in zip(("INDIRECT", "CONTROLLED"), spans, strict=True):
        [row] = effects.rows(Intervention[f"NEGATIVITY_{part}"])
        left = negativity - span.T @ torch.linalg.lstsq(span.T, negativity[:, None]).solution[:, 0]
        torch.testing.assert_close(effects.norms[row], left.norm())
        hooks = at_the_last_token(add_direction(planted, left, 1))
        as_alone(planted, hooks, HARMLESS, tokens, effects.refusal.baseline_log_odds[row])


def test_several_orthogonal_directions_are_ablated_together_as_refusal(planted):
    activations = sides(planted, REFUSAL), sides(planted, NEGATIVITY)
    refusal = (activations[0][0].mean(0) - activations[0][1].mean(0))[1]
    other = outside(drawn(1, 32, seed=7)[0], refusal[None])
    options = {"intervention": "ablation", "layer": 1, "several": torch.stack([refusal, other])}
    effects, tokens, _ = planted_effects(planted, (REFUSAL, NEGATIVITY), activations, **options)
    one, *_ = planted_effects(
        planted, (REFUSAL, NEGATIVITY), activations, intervention="ablation", layer=1
    )
    hooks = []
    for direction in (refusal, other):
        references = activations[0][1].mean(0) @ direction / direction.norm()
        hooks += at_the_last_token(ablate_direction(planted, direction, references))
    found = effects.refusal.target_log_odds
    as_alone(planted, hooks, HARMFUL, tokens, found[1])
    assert (found[1] - one.refusal.target_log_odds[1]).abs().max() > 0.01  # the control
    torch.testing.assert_close(found[2], one.refusal.target_log_odds[2])  # negativity is as before


def test_cross_effects_score_the_classes_at_later_layers(planted):
    activations = sides(planted, REFUSAL), sides(planted, NEGATIVITY)
    pair, options = (REFUSAL, NEGATIVITY), {"intervention": "ablation", "layer": 1}
    effects, *_ = planted_effects(planted, pair, activations, **options)
    assert effects.rows(Intervention.NONE) == [0]
    assert effects.rows(Intervention.RANDOM) == [13, 14]
    assert effects.read_layers == (2, 3)
    expected = held_out_scores(*(side[:, [2, 3]] for side in activations[0]))
    torch.testing.assert_close(effects.refusal.target_scores[0], expected[0], atol=1e-3, rtol=1e-3)
    assert effects.negativity.baseline_scores.shape == (15, 2, 4)


def test_random_directions_are_added_with_the_norm_of_negativity(planted):
    activations = sides(planted, REFUSAL), sides(planted, NEGATIVITY)
    options = {"intervention": "addition", "layer": 1}
    effects, *_ = planted_effects(planted, (REFUSAL, NEGATIVITY), activations, **options)
    [row] = effects.rows(Intervention.NEGATIVITY)
    random = effects.norms[effects.rows(Intervention.RANDOM)]
    torch.testing.assert_close(random, effects.norms[row].expand(2))


def test_cross_effects_of_openings_are_those_of_each_intervention_alone(planted):
    activations = sides(planted, REFUSAL), sides(planted, NEGATIVITY)
    openings = openings_of(planted.tokenizer, ["I"])
    effects = cross_effects(
        planted,
        (REFUSAL, NEGATIVITY),
        activations,
        intervention="addition",
        layer=1,
        random=drawn(1, 32),
        score=openings,
        progress=False,
    )
    first = RefusalTokens(openings.ids[0], openings.texts, "by hand", 1.0, 0.0)
    refusal = (activations[0][0].mean(0) - activations[0][1].mean(0))[1]
    [row] = effects.rows(Intervention.REFUSAL)
    hooks = at_the_last_token(add_direction(planted, refusal, 1))
    as_alone(planted, hooks, HARMLESS, first, effects.refusal.baseline_log_odds[row])


def test_an_orthogonal_part_that_is_nothing_has_no_row(planted):
    same = sides(planted, REFUSAL)
    twins = REFUSAL, Contrast("negativity", HARMFUL, HARMLESS)
    effects, *_ = planted_effects(planted, twins, (same, same), intervention="ablation", layer=2)
    [row] = effects.rows(Intervention.REFUSAL_ALONE)
    assert effects.refusal.target_log_odds[row].isnan().all()
    assert effects.refusal.target_scores[row].isnan().all()
    torch.testing.assert_close(
        effects.refusal.target_log_odds[1], effects.refusal.target_log_odds[2]
    )


def test_held_out_scores_tell_classes_apart_that_are_and_no_others():
    # The control: of two random classes, a discriminant fitted on all would tell all apart.
    target, baseline = drawn(40, 1, 32), drawn(40, 1, 32, seed=1)
    scores = held_out_scores(target, baseline)
    assert abs((scores[0][0, :, None] > scores[1][0]).float().mean() - 0.5) < 0.2
    shifted = held_out_scores(target + 1, baseline)
    assert (shifted[0][0, :, None] > shifted[1][0]).float().mean() > 0.95


def test_a_prompt_has_no_part_in_the_discriminant_it_is_scored_on():
    target, baseline = drawn(10, 1, 8), drawn(10, 1, 8, seed=1)
    before = held_out_scores(target, baseline)[0][0]
    moved = target.clone()
    moved[4] += 100.0
    after = held_out_scores(moved, baseline)[0][0]
    others_of_its_half = [0, 2, 6, 8]
    torch.testing.assert_close(after[others_of_its_half], before[others_of_its_half])
    assert (after[1::2] - before[1::2]).abs().min() > 1e-4


def test_random_directions_have_the_covariance_within_the_classes():
    spread = torch.tensor([3.0, 1.0, 0.1])
    target, baseline = drawn(50, 3) * spread + 100, drawn(50, 3, seed=1) * spread
    drawn_many = random_directions(
        target, baseline, n=20_000, generator=torch.Generator().manual_seed(0)
    )
    within = torch.cat([target - target.mean(0), baseline - baseline.mean(0)])
    expected = within.T @ within / 100
    torch.testing.assert_close(drawn_many.T.cov(), expected, atol=0.2, rtol=0.1)
