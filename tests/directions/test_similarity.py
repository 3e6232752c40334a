"""Similarities of directions: each against an independent computation, and their common laws."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from refusal_lens.directions.covariance import WithinClassCovariance
from refusal_lens.directions.similarity import (
    causal_cosine,
    cosine_matrix,
    cosine_similarity,
    cosine_without_massive,
    massive_dimensions,
    orthogonal_part,
    standardised_cosine,
    whitened_cosine,
)
from refusal_lens.errors import InputError


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


A, B = draw(5, 16, seed=1), draw(5, 16, seed=2)
ROWS = draw(40, 5, 16, seed=3) * torch.linspace(0.2, 4, 16)
UNEMBEDDING = draw(16, 300, seed=4) * torch.linspace(0.1, 2, 16)[:, None] + 5
METRICS = {
    "plain": cosine_similarity,
    "standardised": lambda a, b: standardised_cosine(a, b, WithinClassCovariance.of(ROWS).variance),
    "massive": lambda a, b: cosine_without_massive(a, b, massive_dimensions(ROWS, k=3)),
    "whitened": lambda a, b: whitened_cosine(a, b, WithinClassCovariance.of(ROWS)),
    "causal": lambda a, b: causal_cosine(a, b, UNEMBEDDING),
}


@pytest.mark.parametrize("name", METRICS)
def test_every_similarity_is_symmetric_bounded_and_blind_to_norms(name):
    similarity = METRICS[name]
    here = similarity(A, B)
    torch.testing.assert_close(similarity(B, A), here)
    torch.testing.assert_close(similarity(7 * A, 0.1 * B), here)
    torch.testing.assert_close(similarity(-A, B), -here)
    torch.testing.assert_close(similarity(A, A), torch.ones(5))
    assert (here.abs() <= 1).all()


def test_the_similarities_are_really_different():
    values = torch.stack([similarity(A, B) for similarity in METRICS.values()])
    distances = torch.cdist(values, values) + 10 * torch.eye(len(values))
    assert distances.min() > 1e-2


def test_cosine_equals_numpy():
    a, b = A.numpy(), B.numpy()
    expected = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(cosine_similarity(A, B).numpy(), expected, rtol=1e-6)


def test_the_matrix_holds_the_curve_on_its_diagonal_and_both_orders():
    matrix = cosine_matrix(A, B)
    torch.testing.assert_close(matrix.diagonal(), cosine_similarity(A, B))
    torch.testing.assert_close(cosine_matrix(B, A), matrix.T)


def test_a_layer_of_rounding_noise_gives_nan_and_only_there():
    a = A.clone()
    a[0] *= 1e-16
    cosine = cosine_similarity(a, B)
    assert cosine.isnan().tolist() == [True, False, False, False, False]
    assert cosine_matrix(a, B).isnan().all(1).tolist() == cosine.isnan().tolist()
    # The control: without the floor the noise has a cosine like any other.
    assert cosine_similarity(a, B, noise_floor=0.0).isfinite().all()


def test_a_zero_direction_gives_nan_even_without_a_floor():
    assert cosine_similarity(torch.zeros(5, 16), B.float(), noise_floor=0.0).isnan().all()


def test_published_layer_0_noise_is_nan(reference):
    published = torch.load(
        reference / "directions" / "llama-3.2-1b-instruct_mean_diffs.pt",
        weights_only=True,
        map_location="cpu",
    )
    cosine = cosine_similarity(published[-1], published[-2])
    assert cosine[0].isnan()
    assert cosine[1:].isfinite().all()


def test_standardised_equals_dividing_by_the_standard_deviation():
    deviation = (ROWS - ROWS.mean(0)).square().mean(0).sqrt()
    torch.testing.assert_close(
        METRICS["standardised"](A, B), cosine_similarity(A / deviation, B / deviation)
    )


def test_without_massive_equals_deleting_the_columns():
    found = massive_dimensions(ROWS, k=3)
    for layer in range(5):
        kept = [i for i in range(16) if i not in found[layer].tolist()]
        expected = cosine_similarity(A[layer : layer + 1, kept], B[layer : layer + 1, kept])
        torch.testing.assert_close(METRICS["massive"](A, B)[layer : layer + 1], expected)


def test_massive_dimensions_are_found_where_they_were_planted():
    rows = ROWS.clone()
    rows[:, 2, 7] += 1000
    rows[:, 2, 3] -= 2000
    assert massive_dimensions(rows, k=2)[2].tolist() == [3, 7]


def test_whitened_equals_the_cosine_after_an_explicit_whitening():
    from sklearn.covariance import ledoit_wolf

    for layer in range(5):
        rows = (ROWS - ROWS.mean(0))[:, layer].numpy()
        covariance, _ = ledoit_wolf(rows, assume_centered=True)
        root = np.linalg.cholesky(np.linalg.inv(covariance))
        expected = cosine_similarity(
            torch.from_numpy(A[layer].numpy() @ root)[None],
            torch.from_numpy(B[layer].numpy() @ root)[None],
        )
        assert METRICS["whitened"](A, B)[layer].item() == pytest.approx(expected.item(), abs=1e-6)


def test_causal_equals_the_covariance_of_the_unembedding():
    covariance = np.cov(UNEMBEDDING.numpy(), bias=True)
    a, b = A.numpy(), B.numpy()
    inner = np.einsum("ld,de,le->l", a, covariance, b)
    norms = np.einsum("ld,de,le->l", a, covariance, a) * np.einsum("ld,de,le->l", b, covariance, b)
    np.testing.assert_allclose(
        METRICS["causal"](A, B).numpy(), inner / np.sqrt(norms), rtol=1e-4, atol=1e-5
    )


def test_the_orthogonal_part_is_orthogonal_and_taking_it_twice_changes_nothing():
    part = orthogonal_part(A, B)
    torch.testing.assert_close((part * B).sum(-1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(orthogonal_part(part, B), part)
    assert (A * B).sum(-1).abs().min() > 0.1


@pytest.mark.parametrize("compare", [cosine_similarity, METRICS["whitened"], METRICS["causal"]])
def test_directions_of_different_models_are_refused(compare):
    with pytest.raises((InputError, TypeCheckError)):
        compare(A, draw(5, 12))


def test_the_shape_check_is_switched_on_in_tests():
    with pytest.raises(TypeCheckError):
        cosine_matrix(A[0], B[0])


@pytest.mark.parametrize("k", [0, 16, -1])
def test_an_impossible_number_of_massive_dimensions_is_an_error(k):
    with pytest.raises(InputError, match="choose from 1 to d_model"):
        massive_dimensions(ROWS, k=k)
