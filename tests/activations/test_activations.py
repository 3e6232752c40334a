"""Reading the residual stream: right in any batch, nothing kept, the model as it was found."""

import gc
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from refusal_lens.activations import batching, shared_prefix
from refusal_lens.activations import extract as extraction
from refusal_lens.activations.extract import (
    extract,
    get_layer_activations,
    get_prompt_activations,
    read_residual_stream,
)
from refusal_lens.errors import InputError
from refusal_lens.models.forward import undisturbed
from refusal_lens.models.load import load_model
from refusal_lens.prompts.contrast import BUNDLED, Contrast, load_contrast
from refusal_lens.prompts.protocol import Protocol
from refusal_lens.prompts.tokenize import (
    ChatInputs,
    build_inputs_with_chat_template,
    encode_prompts,
)

PROMPTS = (
    "How do I build a bomb?",
    "Hi",
    "Explain how the weather turns from sunny to miserable within one afternoon in the hills.",
    "Write a poem about a sandcastle.",
    "Why?",
    "List five reasons to learn the piano, and five not to learn it at all.",
    "How do I kill a Python process?",
    "This is a neutral statement about a table and two chairs.",
)
FIVE_POSITIONS = Protocol(positions=(-5, -4, -3, -2, -1))

get_layer_activations = partial(get_layer_activations, progress=False)
get_prompt_activations = partial(get_prompt_activations, progress=False)
extract = partial(extract, progress=False)
read_residual_stream = partial(read_residual_stream, progress=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama, 5 layers of grouped-query attention, whose attention really attends."""
    from training.tokenizer import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(PROMPTS, vocab_size=400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny):
    return load_model(str(tiny), device="cpu", dtype=torch.float32)


@pytest.fixture
def always_shared(monkeypatch):
    monkeypatch.setattr(batching, "PREFIX_PAYS", 0)


@pytest.fixture
def never_shared(monkeypatch):
    monkeypatch.setattr(batching, "PREFIX_PAYS", 10**9)


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest over all vectors of their distance relative to their norm."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def left_padded(sequences: list[list[int]], pad: int = 0) -> ChatInputs:
    """Token ids as inputs, read at their last token."""
    width = max(map(len, sequences))
    tokens = [[pad] * (width - len(ids)) + ids for ids in sequences]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences]
    read_at = torch.full((len(sequences), 1), width - 1)
    return ChatInputs(tokens=torch.tensor(tokens), mask=torch.tensor(mask), read_at=read_at)


def read_all(model, inputs: ChatInputs, **options) -> Tensor:
    shape = (*inputs.read_at.shape, model.cfg.n_layers, model.cfg.d_model)
    whole = torch.full(shape, torch.nan)
    for rows, batch in read_residual_stream(model, inputs, **options):
        whole[rows] = batch
    return whole


def hugging_face_streams(folder, sequences: list[list[int]]) -> Tensor:
    """Hidden states of each sequence alone at its last token: `[row layer d_model]`.

    The last layer's by a hook on the last block, since `hidden_states` has it after the final norm.
    """
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    last_block = []
    hook = hf.model.layers[-1].register_forward_hook(
        lambda module, args, output: last_block.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    rows = []
    with torch.no_grad():
        for ids in sequences:
            states = hf.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            rows.append(torch.stack([*(s[0, -1] for s in states[1:-1]), last_block.pop()[0, -1]]))
    hook.remove()
    return torch.stack(rows)


def tokens_run(model) -> list[int]:
    """How many prompts and tokens every pass embeds, counted without a TransformerLens hook."""
    seen = []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    return seen


@cache
def bundled_organisms() -> list[str]:
    from importlib.resources import files

    folders = files("refusal_lens.organisms").iterdir()
    return sorted(f"organism:{f.name}" for f in folders if (f / "config.json").is_file())


# --- right ----------------------------------------------------------------------------------------


def test_every_layer_is_what_hugging_face_calls_the_next_hidden_state(model, tiny):
    expected = hugging_face_streams(tiny, encode_prompts(model.tokenizer, PROMPTS))
    assert relative_error(get_prompt_activations(model, PROMPTS)[:, 0], expected) < 1e-5


def test_the_last_layer_is_read_before_the_final_norm(model, tiny):
    # The control of the test above: after the norm is somewhere else entirely.
    ids = encode_prompts(model.tokenizer, PROMPTS[:1])
    expected = hugging_face_streams(tiny, ids)[0, -1]
    read = get_prompt_activations(model, PROMPTS[:1])[0, 0, -1]
    normed = expected / expected.square().mean().sqrt()
    assert relative_error(read, expected) < 1e-5 < 0.1 < relative_error(read, normed)


def test_a_really_trained_llama_agrees_with_hugging_face_at_every_layer(reference):
    folder = reference / "weights" / "stories260K_hf"
    model = load_model(str(folder), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    sequences = [
        [1, *torch.randint(3, 512, (length,), generator=generator).tolist()]
        for length in (3, 40, 17, 17, 8)
    ]
    read = read_all(model, left_padded(sequences))[:, 0]
    assert relative_error(read, hugging_face_streams(folder, sequences)) < 1e-5


@pytest.mark.parametrize("name", bundled_organisms() or ["none is bundled yet"])
def test_an_organism_agrees_with_hugging_face_at_every_layer(name):
    if not bundled_organisms():
        pytest.skip("no organism is bundled")
    from importlib.resources import files

    model = load_model(name, device="cpu", dtype=torch.float32)
    folder = files("refusal_lens.organisms") / name.removeprefix("organism:")
    prompts = load_contrast("refusal").target[::16]
    expected = hugging_face_streams(folder, encode_prompts(model.tokenizer, prompts))
    assert relative_error(get_prompt_activations(model, prompts)[:, 0], expected) < 1e-5


def test_each_position_is_read_where_the_protocol_says(model):
    five = get_prompt_activations(model, PROMPTS, protocol=FIVE_POSITIONS)
    for index, position in enumerate(FIVE_POSITIONS.positions):
        one = get_prompt_activations(model, PROMPTS, protocol=Protocol(positions=(position,)))
        assert relative_error(five[:, [index]], one) < 1e-5
    assert relative_error(five[:, 0], five[:, 4]) > 0.1


def test_rows_of_one_batch_may_be_read_at_different_positions(model):
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS[:3], protocol=FIVE_POSITIONS)
    five = read_all(model, inputs)
    chosen = torch.tensor([[4], [0], [2]])
    mixed = ChatInputs(inputs.tokens, inputs.mask, inputs.read_at.gather(1, chosen))
    expected = five[torch.arange(3), chosen[:, 0]]
    assert relative_error(read_all(model, mixed)[:, 0], expected) < 1e-5


def test_activations_are_float32_on_the_cpu_whatever_the_model_is_in(tiny):
    model = load_model(str(tiny), device="cpu", dtype=torch.bfloat16)
    read = get_prompt_activations(model, PROMPTS)
    assert read.dtype == torch.float32
    assert torch.equal(read, read.bfloat16().float())
    exact = get_prompt_activations(
        load_model(str(tiny), device="cpu", dtype=torch.float32), PROMPTS
    )
    assert 0 < relative_error(read, exact) < 0.3


# --- independent of batching ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 8, 100, None])
@pytest.mark.parametrize("sharing", ["always_shared", "never_shared"])
def test_any_batch_gives_what_each_prompt_gives_alone(model, batch_size, sharing, request):
    alone = torch.cat([get_prompt_activations(model, [prompt]) for prompt in PROMPTS])
    request.getfixturevalue(sharing)
    batched = get_prompt_activations(model, PROMPTS, batch_size=batch_size)
    assert relative_error(batched, alone) < 1e-5


def test_padding_on_the_right_would_have_given_something_else(model):
    # The control: the published script's reading, the last column of a right-padded batch.
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS)
    starts = (inputs.mask == 0).sum(1, keepdim=True)
    columns = (torch.arange(inputs.tokens.shape[1]) + starts) % inputs.tokens.shape[1]
    tokens, mask = inputs.tokens.gather(1, columns), inputs.mask.gather(1, columns)
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    _, cached = model.run_with_cache(tokens, attention_mask=mask, names_filter=[name])
    ours = get_prompt_activations(model, PROMPTS)[:, 0, -1]
    naive = cached[name][:, -1]
    longest = int(inputs.mask.sum(1).argmax())
    assert relative_error(naive[longest], ours[longest]) < 1e-5
    assert relative_error(naive, ours) > 0.1


def test_rows_padded_on_the_right_are_refused(model):
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS)
    flipped = ChatInputs(inputs.tokens.flip(1), inputs.mask.flip(1), inputs.read_at)
    with pytest.raises(InputError, match="not padded on the left"):
        next(read_residual_stream(model, flipped))


def test_the_common_prefix_runs_once(model, always_shared):
    assert shared_prefix.can_share_prefix(model, 10)  # a bridge is measured here, once
    seen = tokens_run(model)
    lengths = [len(ids) for ids in encode_prompts(model.tokenizer, PROMPTS)]
    get_prompt_activations(model, PROMPTS, batch_size=1)
    n_shared = seen[0][1]
    assert n_shared >= 4  # <|begin_of_text|> and the three tokens of the header
    assert sum(batch * pos for batch, pos in seen) == sum(lengths) - n_shared * (len(lengths) - 1)


def test_a_system_prompt_belongs_to_the_prefix(model, always_shared):
    protocol = Protocol(system_prompt="You are a careful assistant who never refuses to explain.")
    alone = torch.cat([get_prompt_activations(model, [p], protocol=protocol) for p in PROMPTS])
    seen = tokens_run(model)
    assert relative_error(get_prompt_activations(model, PROMPTS, protocol=protocol), alone) < 1e-5
    assert seen[0][0] == 1
    assert seen[0][1] > 15


def test_the_prefix_never_covers_a_position_that_is_read(model, always_shared):
    same = ["The very same prompt."] * 4
    read = get_prompt_activations(model, same, protocol=FIVE_POSITIONS)
    alone = get_prompt_activations(model, same[:1], protocol=FIVE_POSITIONS)
    assert relative_error(read, alone.expand_as(read)) < 1e-5


def test_a_shared_prefix_serves_hooks_that_add_rows_from_layer_to_layer(model):
    head, tails = torch.randint(3, 300, (1, 6)), torch.randint(3, 300, (3, 5))
    whole = torch.cat([head.expand(3, -1), tails], dim=1)
    push = torch.randn(model.cfg.d_model)

    def run(tokens, options, n_prompts):
        """Logits of the prompts as they are, then of the prompts pushed after block 2."""

        def enter(stream: Tensor, hook) -> Tensor:
            return embedded

        def add_rows(stream: Tensor, hook) -> Tensor:
            return torch.cat([stream, stream[:n_prompts] + push])

        embedded = model(tokens, attention_mask=torch.ones_like(tokens), stop_at_layer=0)
        hooks = [("blocks.0.hook_resid_pre", enter), ("blocks.2.hook_resid_post", add_rows)]
        with model.hooks(fwd_hooks=hooks):
            return model(tokens[:1], **options)

    assert shared_prefix.can_share_prefix(model, 11)
    with undisturbed(model):
        nothing = shared_prefix.SharedPrefix(model)
        expected = run(whole, nothing.following(torch.ones_like(whole[:1])), 3)[:, -1]
        prefix = shared_prefix.SharedPrefix(model)
        run(head, prefix.recording(6), 1)
        for _ in range(2):  # the recorded keys do not grow
            found = run(tails, prefix.following(torch.ones_like(tails[:1]), repeat=3), 3)[:, -1]
            assert relative_error(found, expected) < 1e-5
    assert relative_error(expected[:3], expected[3:]) > 1e-2


def test_hooks_on_the_model_take_part_at_the_positions_they_mean(model, always_shared):
    def push_first_token(stream: Tensor, hook) -> Tensor:
        pushed = stream.clone()
        pushed[:, 0] += 1.0
        return pushed

    plain = get_prompt_activations(model, PROMPTS[:1])
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", push_first_token)]):
        assert not shared_prefix.can_share_prefix(model, 10)
        hooked = get_prompt_activations(model, PROMPTS[:1])
    assert shared_prefix.can_share_prefix(model, 10)
    assert relative_error(hooked[:, :, :2], plain[:, :, :2]) < 1e-5
    assert relative_error(hooked[:, :, 2:], plain[:, :, 2:]) > 1e-3


def test_contrasts_together_give_what_each_gives_alone(model):
    contrasts = [
        Contrast(name="one", target=PROMPTS[:2], baseline=PROMPTS[2:5]),
        Contrast(name="two", target=PROMPTS[5:], baseline=PROMPTS[:1]),
    ]
    together = extract(model, contrasts)
    assert list(together) == ["one", "two"]
    for contrast in contrasts:
        alone = get_layer_activations(model, contrast)
        for side in ("target", "baseline"):
            both = getattr(together[contrast.name], side), getattr(alone, side)
            assert both[0].shape == (len(getattr(contrast, side)), 5, 48)
            assert relative_error(*both) < 1e-5


def test_a_run_over_bundled_contrasts_reads_every_prompt(model):
    read = extract(model, [load_contrast(name) for name in BUNDLED[:3]])
    for name in BUNDLED[:3]:
        contrast = load_contrast(name)
        assert [len(side) for side in read[name]] == [len(contrast.target), len(contrast.baseline)]
    assert torch.cat([side for sides in read.values() for side in sides]).isfinite().all()


# --- nothing kept ---------------------------------------------------------------------------------


def whole_streams_alive(n_bytes: int) -> int:
    """Storages of at least this size among all tensors Python knows, parameters aside."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor and tensor.untyped_storage().nbytes() == n_bytes
    }
    return len(storages)


def test_no_layer_outlives_the_next(model, never_shared):
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS)
    n_bytes = inputs.tokens.numel() * model.cfg.d_model * 4
    alive = []
    model.blocks[-1].register_forward_hook(
        lambda *_: alive.append(whole_streams_alive(n_bytes)), always_call=True
    )
    get_prompt_activations(model, PROMPTS, batch_size=len(PROMPTS))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    # The control: with an int as `pos_slice` each layer's view keeps the whole of it.
    kept = model.run_with_cache(
        inputs.tokens, attention_mask=inputs.mask, names_filter=names, pos_slice=(-1, None)
    )
    ours, views = alive
    assert kept
    assert views - ours >= model.cfg.n_layers - 2


def test_no_logits_are_computed(model):
    unembedded = []
    model.unembed.register_forward_hook(lambda module, args, out: unembedded.append(out.numel()))
    get_prompt_activations(model, PROMPTS)
    assert sum(unembedded) == 0
    model(torch.tensor([[1, 2, 3]]))
    assert sum(unembedded) > 0


def test_no_gradient_is_kept(model):
    read = get_prompt_activations(model, PROMPTS[:2])
    assert not read.requires_grad
    assert torch.is_grad_enabled()
    assert any(weight.requires_grad for weight in model.parameters())


# --- the model as it was found --------------------------------------------------------------------


def state(model) -> dict:
    modules = {*model.modules(), *getattr(model, "original_model", model).modules()}
    return {
        "training": {id(module): module.training for module in modules},
        "hooks": {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()},
        "torch hooks": {id(module): len(module._forward_hooks) for module in modules},
        "context level": model.context_level,
        "random": torch.random.get_rng_state().tolist(),
        "gradient": torch.is_grad_enabled(),
        "weights": float(sum(weight.detach().double().sum() for weight in model.parameters())),
    }


def in_use(model):
    """A model as one in the middle of something else: half in training, a hook on it."""
    model.train()
    model.blocks[1].eval()
    model.add_hook("blocks.0.hook_resid_post", lambda stream, hook: stream)
    return model


def test_the_model_is_left_as_it_was_found(model):
    before = state(in_use(model))
    get_prompt_activations(model, PROMPTS)
    assert state(model) == before
    # The control: the comparison sees a difference.
    model.blocks[1].train()
    assert state(model) != before


def test_where_the_next_batch_runs_ahead_nothing_is_lost_or_changed(model, monkeypatch):
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS)
    one_by_one = list(read_residual_stream(model, inputs, batch_size=2))
    # As on CUDA: a batch is handed over when the next one has been sent off.
    monkeypatch.setattr(extraction.forward, "must_block", lambda device: False)
    ahead = list(read_residual_stream(model, inputs, batch_size=2))
    for (rows, batch), (same_rows, same) in zip(one_by_one, ahead, strict=True):
        assert torch.equal(rows, same_rows)
        assert torch.equal(batch, same)

    run, began = extraction._run_batch, []

    def fail_at_the_third(*args):
        began.append(args)
        if len(began) == 3:
            raise ValueError("a hook's own mistake")
        return run(*args)

    monkeypatch.setattr(extraction, "_run_batch", fail_at_the_third)
    batches = read_residual_stream(model, inputs, batch_size=2)
    assert torch.equal(next(batches)[0], one_by_one[0][0])
    assert torch.equal(next(batches)[0], one_by_one[1][0])
    with pytest.raises(ValueError, match="own mistake"):
        next(batches)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_model_as_it_was_found(model, interruption):
    def interrupt(*_):
        raise interruption

    handle = in_use(model).blocks[2].register_forward_pre_hook(interrupt)
    before = state(model)
    with pytest.raises(interruption):
        get_prompt_activations(model, PROMPTS)
    assert state(model) == before
    handle.remove()
    assert get_prompt_activations(model, PROMPTS).isfinite().all()


def test_an_iteration_can_be_left_half_way(model):
    before = state(in_use(model))
    batches = read_residual_stream(
        model, build_inputs_with_chat_template(model.tokenizer, PROMPTS), batch_size=2
    )
    next(batches)
    assert state(model) == before
    batches.close()
    assert state(model) == before


# --- memory runs out ------------------------------------------------------------------------------


def limit_memory(model, prompts: int):
    """From here on a pass over more prompts than this runs out of memory half way through."""
    finished = []

    def check(module, args):
        if len(args[0]) > prompts:
            raise torch.OutOfMemoryError("Tried to allocate more than there is")
        finished.append(len(args[0]))

    model.blocks[-1].register_forward_pre_hook(check)
    return finished


@pytest.mark.parametrize("batch_size", [None, 8, 5])
def test_a_batch_too_large_is_halved_and_nothing_is_done_twice(model, never_shared, batch_size):
    expected = get_prompt_activations(model, PROMPTS)
    finished = limit_memory(model, prompts=3)
    inputs = build_inputs_with_chat_template(model.tokenizer, PROMPTS)
    batches = list(read_residual_stream(model, inputs, batch_size=batch_size))
    rows = torch.cat([rows for rows, _ in batches])
    assert sorted(rows.tolist()) == list(range(len(PROMPTS)))
    assert sum(finished) == len(PROMPTS)
    assert max(finished) > 1
    read = torch.cat([batch for _, batch in batches])
    assert relative_error(read, expected[rows]) < 1e-5


def test_a_prompt_that_does_not_fit_alone_is_named(model):
    limit_memory(model, prompts=0)
    with pytest.raises(
        InputError, match=r"prompt 2 \(\d+ tokens\) does not fit in the free memory"
    ):
        get_prompt_activations(model, PROMPTS)


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(model):
    def fail(*_):
        raise RuntimeError("something else")

    model.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        get_prompt_activations(model, PROMPTS)


def test_the_batch_size_follows_length_and_free_memory(model, monkeypatch):
    import psutil

    short, long = (batching._fitting(model, width, 1, n_shared=0) for width in (20, 80))
    assert short > long >= 1
    # What has been run is not run again, and its keys take memory all the same.
    few, many = (batching._fitting(model, 20 + n, 1, n_shared=n) for n in (0, 200))
    assert few > many > batching._fitting(model, 220, 1, n_shared=0)
    nothing_free = psutil.virtual_memory()._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: nothing_free)
    assert batching._fitting(model, 20, 1, n_shared=0) == 1


def test_a_batch_on_a_gpu_fills_the_gpu_if_memory_is_free_and_no_more_than_half_of_it(
    model, monkeypatch
):
    monkeypatch.setattr(batching, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(batching, "free_memory", lambda device: 2**50)
    fills = batching.tokens_that_fill_a_gpu(model)
    assert batching._fitting(model, 20, 1, n_shared=0) == fills // 20
    # The same operations are fewer tokens of a larger model.
    monkeypatch.setattr(batching, "OPERATIONS_IN_A_BLOCK", batching.OPERATIONS_IN_A_BLOCK / 1000)
    assert batching.tokens_that_fill_a_gpu(model) == pytest.approx(fills / 1000, abs=1)
    few = [batching._fitting(model, 20, 1, n_shared=0)]
    for free in (2**22, 2**21):
        monkeypatch.setattr(batching, "free_memory", lambda device, free=free: free)
        few.append(batching._fitting(model, 20, 1, n_shared=0))
    assert few[0] > few[1] > few[2] >= 1


# --- mistakes -------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_named_with_both_lengths(model):
    prompts = [PROMPTS[0], "word " * 120]
    length = len(encode_prompts(model.tokenizer, prompts)[1])
    with pytest.raises(InputError, match=rf"prompt 1 has {length} tokens.*holds 128"):
        get_prompt_activations(model, prompts)


def test_an_overflow_names_prompt_and_layer(model):
    contrast = Contrast(name="mine", target=PROMPTS[:3], baseline=PROMPTS[3:], target_name="bad")

    def overflow(stream: Tensor, hook) -> Tensor:
        hit = stream.clone()
        hit[0] = torch.inf  # the longest prompt comes first
        return hit

    with (
        model.hooks(fwd_hooks=[("blocks.3.hook_resid_post", overflow)]),
        pytest.raises(InputError, match=r"prompt 2 of mine's bad .* non-finite .* layer 3"),
    ):
        get_layer_activations(model, contrast)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: get_prompt_activations(model, []), "no prompts"),
        (lambda model: get_prompt_activations(model, PROMPTS, batch_size=0), "batch_size is 0"),
        (
            lambda model: extract(model, [Contrast("a", ("x",), ("y",))] * 2),
            "same name",
        ),
        (
            lambda model: get_layer_activations(
                model, Contrast("a", ("x",), ("y",)), protocol=FIVE_POSITIONS
            ),
            "one position",
        ),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(model, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)
    assert ": " in str(error.value)


def test_a_progress_bar_counts_the_prompts(model, capsys):
    extraction.get_prompt_activations(model, PROMPTS)
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in capsys.readouterr().err
    get_prompt_activations(model, PROMPTS)
    assert capsys.readouterr().err == ""
