"""Other projects' direction files: read in this package's counting, written for other tools."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from refusal_lens.activations import disk as artifacts
from refusal_lens.directions.formats import (
    Directions,
    compare,
    read_directions,
    sign_flips,
    write_control_vector,
    write_directions,
)
from refusal_lens.directions.similarity import cosine_similarity
from refusal_lens.errors import InputError


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(n=4, *, layers=None, **known):
    vectors = draw(n, 8, seed=n)
    return Directions(vectors, tuple(range(n)) if layers is None else layers, "here", **known)


KNOWN = some(
    3,
    layers=(-1, 2, 5),
    position=-2,
    model="a/model",
    contrast="x - y",
    normalisation="none",
    notes=("read upside down", 'called "so"'),
)


def same(a: Directions, b: Directions) -> bool:
    facts = ("layers", "position", "model", "contrast", "normalisation", "notes")
    return (
        a.vectors.dtype == b.vectors.dtype
        and torch.equal(a.vectors, b.vectors)
        and all(getattr(a, fact) == getattr(b, fact) for fact in facts)
    )


# Our own files


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_what_was_written_is_read_back_with_all_that_is_known(tmp_path, ending, dtype):
    written = Directions(**{**vars(KNOWN), "vectors": KNOWN.vectors.to(dtype)})
    path = write_directions(written, tmp_path / f"d{ending}")
    read = read_directions(path)
    assert same(read, written)
    assert read.source == str(path)
    # The control: forgetting what lies beside the numbers is noticed.
    if ending == ".npy":
        (tmp_path / "d.npy.json").unlink()
        assert not same(read_directions(path), written)


def test_numpy_has_no_bfloat16_and_float32_loses_nothing_of_it(tmp_path):
    half = Directions(draw(2, 8, dtype=torch.bfloat16), (0, 1), "here")
    read = read_directions(write_directions(half, tmp_path / "d.npy"))
    assert torch.equal(read.vectors, half.vectors.float())
    read = read_directions(write_directions(half, tmp_path / "d.safetensors"))
    assert torch.equal(read.vectors, half.vectors)


def test_unknown_stays_unknown_through_a_file(tmp_path):
    nothing_known = Directions(draw(2, 8), None, "here")
    for ending in (".safetensors", ".npy"):
        assert same(
            read_directions(write_directions(nothing_known, tmp_path / f"d{ending}")), nothing_known
        )


@settings(max_examples=40, deadline=None)
@given(
    position=st.none() | st.integers(-9, -1) | st.sampled_from(["last_prompt_token", "--2", "1e3"]),
    text=st.none() | st.text(st.characters(codec="utf-8"), max_size=9),
    notes=st.lists(st.text(st.characters(codec="utf-8")), max_size=2),
)
def test_any_text_survives_the_metadata(tmp_path_factory, position, text, notes):
    known = Directions(draw(1, 4), (0,), "here", position, text, text, text, tuple(notes))
    folder = tmp_path_factory.getbasetemp()
    for ending in (".safetensors", ".npy"):
        read = read_directions(write_directions(known, folder / f"any{ending}"))
        assert same(read, known)


def test_a_run_s_folder_is_read_by_the_name_of_a_contrast(tmp_path):
    refusal, negativity = draw(4, 8, seed=1), draw(4, 8, seed=2)
    metadata = {"layer": "row l is blocks.{l}.hook_resid_post", "model": "m", "position": "-1"}
    with artifacts.whole_directory(tmp_path) as staging:
        artifacts.write_tensors(
            staging / "directions.safetensors",
            {"refusal": refusal, "negativity": negativity},
            metadata=metadata,
        )
    read = read_directions(tmp_path, key="refusal")
    assert torch.equal(read.vectors, refusal)
    assert (read.layers, read.position, read.model, read.contrast) == (
        (0, 1, 2, 3),
        -1,
        "m",
        "refusal",
    )
    with pytest.raises(InputError, match=r"'negativity', 'refusal': name one with key="):
        read_directions(tmp_path)
    with pytest.raises(InputError, match="no tensor named 'positivity'"):
        read_directions(tmp_path, key="positivity")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = write_directions(KNOWN, tmp_path / "d.npy")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match="written as"):
        write_directions(KNOWN, tmp_path / "d.txt")
    with pytest.raises(InputError, match="can't write to"):
        write_directions(KNOWN, path / "below" / "d.npy")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# Files of others


def published(folder: Path) -> torch.Tensor:
    """A made-up run of Arditi et al.'s pipeline, laid out as they lay it out."""
    mean_diffs = draw(5, 6, 8, dtype=torch.float64)
    torch.save(mean_diffs, folder / "mean_diffs.pt")
    torch.save(mean_diffs[-2, 3], folder / "direction.pt")
    (folder / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 3}))
    return mean_diffs


def test_arditi_s_rows_move_one_layer_down_and_the_translation_is_stated(tmp_path):
    mean_diffs = published(tmp_path)
    read = read_directions(tmp_path / "mean_diffs.pt")
    assert read.layers == (-1, 0, 1, 2, 3, 4)
    assert read.position == -1
    assert torch.equal(read.vectors, mean_diffs[-1])
    assert any("before the block: its layer l is layer l - 1 here" in note for note in read.notes)
    assert any("position -1 of its positions -5 to -1" in note for note in read.notes)
    for position in range(-5, 0):
        read = read_directions(tmp_path / "mean_diffs.pt", position=position)
        assert torch.equal(read.vectors, mean_diffs[position])
        assert read.position == position


def test_arditi_s_selected_direction_finds_its_place_in_the_file_beside_it(tmp_path):
    published(tmp_path)
    direction = read_directions(tmp_path / "direction.pt")
    assert (direction.layers, direction.position) == ((2,), -2)
    all_layers = read_directions(tmp_path / "mean_diffs.pt", position=-2)
    assert torch.equal(all_layers.at(2).vectors, direction.vectors)
    # The control: one layer off, as without the translation, it is another direction.
    assert not torch.equal(all_layers.at(3).vectors, direction.vectors)


def test_without_the_file_beside_it_a_direction_has_no_layer_until_one_is_stated(tmp_path):
    published(tmp_path)
    (tmp_path / "direction_metadata.json").unlink()
    assert read_directions(tmp_path / "direction.pt").layers is None
    stated = read_directions(tmp_path / "direction.pt", layer=3, hook="resid_pre", position=-2)
    assert (stated.layers, stated.position) == ((2,), -2)


@pytest.mark.parametrize(
    "content", ["[]", '{"pos": -2}', '{"pos": "x", "layer": 1}', "{", "null", "[" * 99_999]
)
def test_a_damaged_file_beside_a_direction_is_not_passed_over(tmp_path, content):
    published(tmp_path)
    (tmp_path / "direction_metadata.json").write_text(content)
    with pytest.raises(InputError, match=r"direction_metadata\.json"):
        read_directions(tmp_path / "direction.pt")


@pytest.mark.parametrize("position", [-6, 0, 5, "last_prompt_token"])
def test_a_position_that_the_file_lacks_is_an_error(tmp_path, position):
    published(tmp_path)
    with pytest.raises(InputError, match="holds the positions -5 to -1, not"):
        read_directions(tmp_path / "mean_diffs.pt", position=position)


def test_activations_are_not_taken_for_positions(tmp_path):
    np.save(tmp_path / "a.npy", draw(64, 4, 8).numpy())
    with pytest.raises(InputError, match="rows are prompts, not positions"):
        read_directions(tmp_path / "a.npy")


def plain(folder: Path, ending: str, tensor: torch.Tensor) -> Path:
    path = folder / f"plain{ending}"
    if ending == ".npy":
        np.save(path, tensor.numpy())
    elif ending == ".json":
        path.write_text(json.dumps(tensor.tolist()))
    elif ending == ".safetensors":
        artifacts.write_tensors(path, {"v": tensor})
    else:
        torch.save({"v": tensor, "n": 3} if ending == ".pth" else tensor, path)
    return path


ENDINGS = [".pt", ".pth", ".npy", ".safetensors", ".json"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_a_plain_tensor_s_layers_are_unknown_until_their_hook_is_stated(tmp_path, ending, shape):
    tensor = draw(*shape, dtype=torch.float64)
    path = plain(tmp_path, ending, tensor)
    read = read_directions(path)
    assert torch.equal(
        read.vectors, tensor.reshape(-1, 3, 8)[-1] if len(shape) > 1 else tensor[None]
    )
    assert read.layers is None
    layer = 1 if len(shape) == 1 else None
    after = read_directions(path, hook="resid_post", layer=layer)
    before = read_directions(path, hook="resid_pre", layer=layer)
    assert after.layers == ((1,) if len(shape) == 1 else (0, 1, 2))
    assert before.layers == tuple(number - 1 for number in after.layers)


def test_every_float_reads_in_its_own_dtype_big_endian_and_fortran_order_too(tmp_path):
    rows = draw(3, 8, dtype=torch.float64)
    np.save(tmp_path / "f.npy", np.asfortranarray(rows.numpy()).astype(">f8"))
    assert torch.equal(read_directions(tmp_path / "f.npy").vectors, rows)
    torch.save(rows.T.contiguous().T, tmp_path / "t.pt")
    assert torch.equal(read_directions(tmp_path / "t.pt").vectors, rows)
    torch.save(torch.nn.Parameter(rows).detach().bfloat16(), tmp_path / "b.pt")
    assert read_directions(tmp_path / "b.pt").vectors.dtype == torch.bfloat16


def test_one_row_of_a_larger_tensor_is_read_though_all_of_it_was_saved(tmp_path):
    rows = draw(3, 8)
    torch.save(rows[1], tmp_path / "row.pt")
    assert torch.equal(read_directions(tmp_path / "row.pt").vectors, rows[1:2])


def test_a_layer_in_the_name_of_a_file_is_the_layer_as_its_project_counts(tmp_path):
    row = draw(1, 8, dtype=torch.float64)
    (tmp_path / "x_das_layer7.json").write_text(json.dumps(row[0].tolist()))
    alone = read_directions(tmp_path / "x_das_layer7.json")
    assert alone.layers == (6,)
    assert torch.equal(alone.vectors, row)


def test_what_the_caller_states_goes_before_what_the_file_says(tmp_path):
    path = write_directions(KNOWN, tmp_path / "d.safetensors")
    read = read_directions(path, model="mine", position=-9)
    assert (read.model, read.position) == ("mine", -9)
    with pytest.raises(InputError, match="layer= is for a single direction"):
        read_directions(path, layer=3)
    with pytest.raises(InputError, match="no tensor named 'v': leave key= out"):
        read_directions(plain(tmp_path, ".npy", draw(3, 8)), key="v")
    with pytest.raises(InputError, match="no tensor named 'v': leave key= out"):
        read_directions(plain(tmp_path, ".pt", draw(3, 8)), key="v")


# Control vectors and steering vectors


@pytest.fixture
def repeng(monkeypatch):
    """The real repeng, whose one annotation with NumPy 1's name for float64 is all that ails it."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    return pytest.importorskip("repeng")


BLOCKS = some(3, layers=(1, 2, 7), position=-1, model="a/model", contrast="x - y")


def test_a_control_vector_loads_in_repeng_under_our_layer_numbers(tmp_path, repeng):
    path = write_control_vector(BLOCKS, tmp_path / "c.gguf", model_type="llama")
    theirs = repeng.ControlVector.import_gguf(path)
    assert theirs.model_type == "llama"
    assert list(theirs.directions) == [1, 2, 7]
    for row, layer in enumerate(BLOCKS.layers):
        np.testing.assert_array_equal(theirs.directions[layer], BLOCKS.vectors[row].numpy())
    assert same(read_directions(path), BLOCKS)


def test_a_control_vector_has_no_layer_0_which_llama_cpp_refuses(tmp_path):
    directions = some(3, layers=(0, 1, 5), contrast="x - y")
    path = write_control_vector(directions, tmp_path / "c.gguf", model_type="llama")
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert names == {"direction.1", "direction.5"}
    read = read_directions(path)
    assert torch.equal(read.vectors, directions.vectors[1:])
    assert (read.layers, read.contrast) == ((1, 5), "x - y")
    assert any("layer 0 left out" in note for note in read.notes)
    with pytest.raises(InputError, match=r"only layer 0, which llama\.cpp can't steer: give later"):
        write_control_vector(some(1, layers=(0,)), tmp_path / "c.gguf", model_type="llama")


def test_a_control_vector_of_repeng_s_is_read_as_repeng_reads_it(tmp_path, repeng):
    directions = {layer: draw(8, seed=layer).numpy() for layer in (5, 3, 4)}
    repeng.ControlVector("qwen2", directions).export_gguf(tmp_path / "theirs.gguf")
    read = read_directions(tmp_path / "theirs.gguf")
    assert read.layers == (3, 4, 5)
    for row, layer in enumerate(read.layers):
        np.testing.assert_array_equal(read.vectors[row].numpy(), directions[layer])
    assert any("type qwen2" in note for note in read.notes)
    assert any("direction.{l} is block l's output" in note for note in read.notes)


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **heads)).eval()


def block_outputs(model) -> torch.Tensor:
    """What each block hands on, `[layer d_model]`, read by hooks of the test's own."""
    outputs = {}
    hooks = [
        block.register_forward_hook(
            lambda _, __, output, layer=layer: outputs.__setitem__(
                layer, (output[0] if isinstance(output, tuple) else output)[0, -1].clone()
            )
        )
        for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    for hook in hooks:
        hook.remove()
    return torch.stack([outputs[layer] for layer in range(len(hooks))])


def first_changed(before: torch.Tensor, after: torch.Tensor) -> tuple[int, torch.Tensor]:
    change = (after - before).abs().amax(-1) > 1e-7
    layer = int(change.nonzero()[0])
    return layer, after[layer] - before[layer]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_repeng_adds_our_layer_where_we_say_it_was_read(tmp_path, repeng, layer):
    directions = Directions(draw(1, 8), (layer,), "here")
    path = write_control_vector(directions, tmp_path / "c.gguf", model_type="llama")
    model = tiny_model()
    before = block_outputs(model)
    controlled = repeng.ControlModel(model, [layer])
    controlled.set_control(repeng.ControlVector.import_gguf(path))
    # repeng wraps each block in a module of its own; a hook on that module sees what it hands on.
    changed, by = first_changed(before, block_outputs(model))
    assert changed == layer
    torch.testing.assert_close(by, directions.vectors[0])


@pytest.mark.parametrize(
    ("layers", "message"), [(None, "2 rows of unknown layers"), ((-1, 0), "layers -1 to 0")]
)
def test_layers_without_a_block_are_not_written_for_others(tmp_path, layers, message):
    directions = Directions(draw(2, 8), layers, "here")
    with pytest.raises(InputError, match=message):
        write_control_vector(directions, tmp_path / "c.gguf", model_type="llama")


# The record itself


@pytest.mark.parametrize(
    ("vectors", "layers", "message"),
    [
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), (0, 1), "not finite in row 1"),
        (torch.tensor([[1.0, torch.inf]]), None, "not finite in row 0"),
        (torch.ones(2, 0), (0, 1), "holds no numbers"),
        (torch.ones(2, 3), (0,), "its 2 rows as layers 0: there must be one a row"),
        (torch.ones(2, 3), (1, 0), "ascending from"),
        (torch.ones(2, 3), (1, 1), "ascending from"),
        (torch.ones(2, 3), (-2, 1), "ascending from -1"),
    ],
)
def test_a_record_that_contradicts_itself_is_an_error(vectors, layers, message):
    with pytest.raises(InputError, match=message):
        Directions(vectors, layers, "here")


def test_the_shape_check_is_switched_on_in_tests():
    with pytest.raises(TypeCheckError):
        Directions(torch.ones(3), None, "here")


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match="has no layer 9: layers 0 to 3"):
        some().at(1, 9)
    assert torch.equal(some().at(2).vectors, some().vectors[2:3])


# Comparing


def test_the_comparison_is_the_cosine_at_the_layers_both_have():
    a, b = some(6), some(4, layers=(2, 3, 5, 9))
    result = compare(a, b)
    assert result.layers == (2, 3, 5)
    torch.testing.assert_close(
        result.cosine, cosine_similarity(a.vectors[[2, 3, 5]], b.vectors[:3])
    )
    assert result.matrix.shape == (6, 4)
    swapped = compare(b, a)
    torch.testing.assert_close(swapped.cosine, result.cosine)
    torch.testing.assert_close(swapped.matrix, result.matrix.T)


def test_noise_is_judged_against_the_whole_file_not_the_common_layers():
    vectors = draw(3, 8)
    vectors[0] *= 1e-16
    noisy = Directions(vectors, (0, 1, 2), "noisy")
    result = compare(noisy, Directions(draw(1, 8), (0,), "other"))
    assert result.cosine.isnan().all()
    assert any("A is rounding noise at layer 0" in warning for warning in result.warnings)


CLEAN = {"position": -1, "model": "m"}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (CLEAN, CLEAN, None),
        (CLEAN, CLEAN | {"model": "n"}, "different models (m, n)"),
        (CLEAN, CLEAN | {"model": None}, "model of B not recorded"),
        (CLEAN | {"model": None}, CLEAN | {"model": None}, "model of A and B not recorded"),
        (CLEAN, CLEAN | {"position": -2}, "different positions (-1, -2)"),
        (CLEAN | {"position": None}, CLEAN, "position of A not recorded"),
        (CLEAN, CLEAN | {"layers": (7, 8, 9, 10)}, "no layer in common"),
    ],
)
def test_each_warning_comes_where_it_applies_and_alone(a, b, expected):
    b = {"layers": (0, 1, 2, 3)} | b
    vectors = torch.eye(4, 8)
    result = compare(
        Directions(vectors, (0, 1, 2, 3), "a", **a), Directions(vectors + 1, source="b", **b)
    )
    if expected is None:
        assert result.warnings == ()
    else:
        assert len(result.warnings) == 1
        assert result.warnings[0].startswith(expected)
        assert f"! {expected}" in str(result)


@pytest.mark.parametrize(
    ("model", "layers", "other", "depths"),
    [
        (None, (0, 1, 2), (0, 1, 2, 3), "A has 3 layers, B 4"),
        (None, (-1, 0, 1), None, "A has 3 layers, B 4"),
        (None, (0, 1, 2), (-1, 0, 1), None),
        (None, (1, 2, 3), (0, 1, 2, 3), None),
        (None, (0,), (0, 1, 2, 3), None),
        ("m", (0, 1, 2), (0, 1, 2, 3), None),
    ],
)
def test_two_depths_are_two_models_unless_layers_were_left_out(model, layers, other, depths):
    a = Directions(draw(len(layers), 8), layers, "a", model=model)
    b = Directions(draw(len(other or "four"), 8), other, "b", model=model)
    said = [warning for warning in compare(a, b).warnings if "unless layers" in warning]
    assert [warning.partition(":")[0] for warning in said] == [depths] * bool(depths)


def test_unknown_layers_are_compared_row_by_row_with_a_warning():
    a, b = some(4, **CLEAN), Directions(some(4).vectors, None, "b", **CLEAN)
    result = compare(a, b)
    assert result.layers is None
    torch.testing.assert_close(result.cosine, torch.ones(4))
    assert "layers of B not recorded" in result.warnings[0]
    fewer = compare(a, Directions(draw(3, 8), None, "b", **CLEAN))
    assert fewer.cosine.numel() == 0
    assert "4 and 3 rows can't be matched" in fewer.warnings


def test_different_widths_are_an_error():
    with pytest.raises(InputError, match="has d_model 8, other 9"):
        compare(some(), Directions(draw(4, 9), (0, 1, 2, 3), "other"))


def test_a_sign_that_flips_is_reported_at_the_layer_where_it_does():
    smooth = torch.ones(5, 8, dtype=torch.float64) + 0.1 * draw(5, 8)
    signs = torch.tensor([1, 1, -1, -1, 1.0])[:, None]
    flips = sign_flips(Directions(smooth * signs, (3, 4, 5, 6, 7), "flipping"))
    assert [(here, after) for here, after, _ in flips] == [(4, 5), (6, 7)]
    assert all(cosine < -0.9 for *_, cosine in flips)
    # The control: the same directions with their signs in order, and with a gap instead of a step.
    assert sign_flips(Directions(smooth, (3, 4, 5, 6, 7), "smooth")) == ()
    assert sign_flips(Directions(smooth[1:3] * signs[1:3], (4, 6), "gap")) == ()


def test_the_text_shows_one_direction_against_every_layer():
    text = str(compare(some(1, layers=(9,)), some(4)))
    assert "A's one direction against every layer of B" in text
    table = text.partition("cosine\n")[2].partition("!")[0]
    assert [line.split()[0] for line in table.splitlines()] == list("0123")
    assert "B's one direction against every layer of A" in str(compare(some(4), some(1)))


def test_the_text_of_a_file_with_itself_shows_the_steps_through_depth():
    d = some(4)
    text = str(compare(d, d))
    assert "from each layer to the next" in text
    assert "not recorded" not in text
    steps = cosine_similarity(d.vectors[:-1], d.vectors[1:]).tolist()
    for layer, step in enumerate(steps):
        assert f"{layer:>5}  {step:>+7.4f}" in text


def test_a_pickled_numpy_array_is_refused_and_the_message_says_how_to_convert_it(tmp_path):
    path, rows = tmp_path / "harmfulness.pt", draw(4, 8)
    torch.save(rows.numpy(), path)
    with pytest.raises(InputError, match="nothing in it was run") as refused:
        read_directions(path)
    convert = str(refused.value).split("convert it: ")[1]
    code = convert.replace("FILE", str(path)).replace("NEW.npy", str(tmp_path / "new.npy"))
    exec(code, {"numpy": np, "torch": torch})
    assert torch.equal(read_directions(tmp_path / "new.npy").vectors, rows)
