"""What directions published by others say, read in this package's counting."""

import json
import re
from dataclasses import replace

import pytest
import torch

from refusal_lens.directions.formats import (
    Directions,
    compare,
    read_directions,
    sign_flips,
    write_control_vector,
    write_directions,
)

SELECTED = {"gemma-2b-it": (-2, 10), "qwen-1_8b-chat": (-2, 15)}
"""(position, layer before the block) that Arditi et al.'s selection chose."""
DEPTH = {"gemma-2b-it": 18, "qwen-1_8b-chat": 24, "llama-3.2-1b-instruct": 16}


def mean_diffs(reference, model, position) -> Directions:
    [file] = (reference / "directions").glob(f"{model}_mean_diffs*.pt")
    return read_directions(file, position=position, model=model)


def selected(reference, model) -> Directions:
    position, layer = SELECTED[model]
    file = reference / "directions" / f"{model}_direction_arditi.pt"
    return read_directions(file, layer=layer, hook="resid_pre", position=position, model=model)


def sentiment(reference) -> Directions:
    files = (reference / "directions").glob("gpt2-small_sentiment_das_layer*.json")
    each = sorted((read_directions(file, model="gpt2") for file in files), key=lambda x: x.layers)
    layers = tuple(one.layers[0] for one in each)
    return replace(each[0], vectors=torch.cat([one.vectors for one in each]), layers=layers)


@pytest.mark.parametrize("model", SELECTED)
def test_the_selected_direction_is_its_row_bit_for_bit(reference, model):
    direction = selected(reference, model)
    position, layer = SELECTED[model]
    rows = mean_diffs(reference, model, position)
    assert rows.layers == tuple(range(-1, DEPTH[model] - 1))
    assert direction.layers == (layer - 1,)
    assert torch.equal(rows.at(layer - 1).vectors, direction.vectors)
    result = compare(direction, rows)
    assert result.layers == (layer - 1,)
    assert result.cosine.item() == pytest.approx(1, abs=1e-6)
    # The control: at no other layer, and at no other position of that layer, is it the same.
    assert int((result.matrix[0] > 0.999).sum()) == 1
    for other in {-5, -4, -3, -2, -1} - {position}:
        elsewhere = compare(direction, mean_diffs(reference, model, other))
        assert elsewhere.cosine.item() < 0.999
        assert any(w.startswith("different positions") for w in elsewhere.warnings)


def test_the_selected_direction_is_found_through_the_published_metadata(reference, tmp_path):
    """The files laid out as the project lays them out, its metadata beside its direction."""
    source = reference / "directions" / "gemma-2b-it_direction_arditi.pt"
    metadata = reference / "scores" / "gemma-2b-it_direction_metadata_arditi.json"
    (tmp_path / "direction.pt").write_bytes(source.read_bytes())
    (tmp_path / "direction_metadata.json").write_bytes(metadata.read_bytes())
    read = read_directions(tmp_path / "direction.pt", model="gemma-2b-it")
    assert (read.position, read.layers) == (-2, (9,))
    assert torch.equal(read.vectors, selected(reference, "gemma-2b-it").vectors)


def test_gemma_s_selected_direction_against_its_neighbours(reference):
    direction = selected(reference, "gemma-2b-it")
    rows = mean_diffs(reference, "gemma-2b-it", -2)
    result = compare(direction, rows)
    # Layers 5 to 15 before the block, as published, are 4 to 14 here.
    here = [rows.layers.index(layer) for layer in range(4, 15)]
    published = [0.20, 0.31, 0.55, 0.64, 0.69, 1, 0.76, 0.64, 0.51, 0.43, 0.35]
    assert result.matrix[0, here].tolist() == pytest.approx(published, abs=0.006)
    # The control: one layer off, as without the translation, the figures do not fit.
    shifted = [row + 1 for row in here]
    assert result.matrix[0, shifted].tolist() != pytest.approx(published, abs=0.1)


@pytest.mark.parametrize("model", DEPTH)
@pytest.mark.parametrize("position", [-5, -1])
def test_before_the_first_block_there_is_noise_and_no_agreement(reference, model, position):
    rows = mean_diffs(reference, model, position)
    result = compare(rows, rows)
    assert result.matrix[0].isnan().all()
    assert result.matrix[:, 0].isnan().all()
    assert result.matrix[1:, 1:].isfinite().all()
    assert any(w.startswith("A is rounding noise at layer -1") for w in result.warnings)
    # The control: the noise has a norm and a cosine like any other vector.
    noise = rows.vectors[0]
    assert 0 < noise.norm() < 1e-12
    assert torch.cosine_similarity(noise, rows.vectors[1], dim=0).isfinite()


@pytest.mark.parametrize("model", DEPTH)
def test_directions_resemble_their_neighbours_more_the_nearer_they_are(reference, model):
    rows = mean_diffs(reference, model, -1)
    matrix = compare(rows, rows).matrix[1:, 1:]
    by_distance = [matrix.diagonal(distance).mean().item() for distance in range(1, 9)]
    assert by_distance == sorted(by_distance, reverse=True)
    assert by_distance[0] > 0.5
    assert by_distance[-1] < by_distance[0] - 0.2
    # The control: between the models, whose d_model is the same, there is nothing of the kind.
    other = "qwen-1_8b-chat" if model != "qwen-1_8b-chat" else "gemma-2b-it"
    across = compare(rows, mean_diffs(reference, other, -1))
    assert across.cosine[1:].abs().max() < 0.25
    assert any(w.startswith(f"different models ({model}, {other})") for w in across.warnings)


def test_refusal_directions_do_not_flip_their_sign(reference):
    for model in DEPTH:
        for position in range(-5, 0):
            assert sign_flips(mean_diffs(reference, model, position)) == ()


def test_gpt2_s_sentiment_flips_its_sign_twice_and_is_reported_as_doing_so(reference):
    directions = sentiment(reference)
    assert directions.layers == tuple(range(-1, 12))
    assert directions.normalisation == "unit norm"
    flips = sign_flips(directions)
    # Published as 9 to 10 and 10 to 11, before the block.
    assert [(here, after) for here, after, _ in flips] == [(8, 9), (9, 10)]
    assert [cosine for *_, cosine in flips] == pytest.approx([-0.895, -0.848], abs=5e-4)
    text = str(compare(directions, directions))
    assert re.search(r"! A turns round from layer 8 to 9 \(cosine -0\.895 with itself\)", text)
    assert re.search(r"! A turns round from layer 9 to 10 \(cosine -0\.848 with itself\)", text)
    # Turned back, the axis is one axis: the flips say nothing about the model.
    turned = directions.vectors.clone()
    turned[directions.layers.index(9)] *= -1
    assert sign_flips(Directions(turned, directions.layers, "turned")) == ()


def test_the_numbers_are_the_file_s_own(reference):
    directions = sentiment(reference)
    file = reference / "directions" / "gpt2-small_sentiment_das_layer7.json"
    assert directions.at(6).vectors[0].tolist() == json.loads(file.read_text())


def test_directions_of_models_of_different_width_are_refused(reference):
    with pytest.raises(ValueError, match="has d_model 768"):
        compare(sentiment(reference), mean_diffs(reference, "gemma-2b-it", -1))


@pytest.mark.parametrize("other", ["qwen-1_8b-chat", "gemma-2b-it"])
def test_two_published_files_of_one_width_and_another_depth_are_of_different_models(
    reference, other
):
    path = reference / "directions" / "{}_mean_diffs_arditi.pt"
    gemma, other = (read_directions(str(path).format(name)) for name in ("gemma-2b-it", other))
    said = [warning for warning in compare(gemma, other).warnings if "different models" in warning]
    depths = "A has 18 layers, B 24: they are of different models, unless layers were left out"
    assert said == ([depths] if len(other.vectors) == 24 else [])


def test_a_published_file_passes_through_every_format_unchanged(reference, tmp_path):
    rows = mean_diffs(reference, "llama-3.2-1b-instruct", -1)
    for ending in (".safetensors", ".npy"):
        read = read_directions(write_directions(rows, tmp_path / f"d{ending}"))
        assert torch.equal(read.vectors, rows.vectors)
        assert read.metadata() == rows.metadata()
    blocks = rows.at(*range(1, 15))
    written = write_control_vector(blocks, tmp_path / "d.gguf", model_type="llama")
    read = read_directions(written)
    assert torch.equal(read.vectors, blocks.vectors.float())
    assert read.metadata() == blocks.metadata()
