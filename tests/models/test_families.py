"""Each family of chat models is read as Hugging Face computes it and ablated whole, or refused."""

import pytest
from families import FAMILIES, GENERATION, measure

from refusal_lens.errors import InputError

KNOWN_TO_3 = {"Phi", "BLOOM", "Apertus"}  # of those that it can't run
READ_MORE_THAN_THE_STREAM = {"Gemma 4", "Gemma 4 with sight", "BLOOM"}
RUN = [family for family, (_, _, generations) in FAMILIES.items() if GENERATION in generations]


@pytest.mark.parametrize("family", RUN)
def test_every_layer_is_hugging_faces_and_an_ablation_leaves_nothing(family):
    found = measure(family)
    assert found.parity < 1e-4
    assert found.left < 1e-5
    assert found.before > 0.1, "there would have been nothing to ablate"
    assert found.apart < 1e-3
    assert found.rows_join == (family not in READ_MORE_THAN_THE_STREAM)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in RUN])
def test_what_transformer_lens_cannot_run_is_refused_in_one_line(family):
    with pytest.raises(InputError, match=r"TransformerLens \d.*transformer_lens") as error:
        measure(family)
    if GENERATION == 3:
        assert ("TransformerLens 3 has no" in str(error.value)) == (family not in KNOWN_TO_3)
