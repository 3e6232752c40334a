"""Results as tables: layers by measures, prompts by projections and refusal score."""

from inspect import unwrap

import pandas as pd
import pytest
import torch

from refusal_lens import InputError, load_results


@pytest.fixture(scope="module")
def results(quick_results):
    return quick_results("specific")


def test_layers_by_measures_hold_every_curve(results, tmp_path):
    table = results.to_pandas()
    assert table.index.name == "layer"
    assert len(table) == results.n_layers
    cosine = torch.tensor(table["refusal_vs_negativity"].to_numpy()).float()
    assert torch.equal(
        cosine.nan_to_num(), results.similarities["refusal_vs_negativity"].nan_to_num()
    )
    assert {"norm of refusal", *results.metrics, *results.estimators, *results.auroc} <= {*table}
    table.to_parquet(tmp_path / "layers.parquet")
    assert pd.read_parquet(tmp_path / "layers.parquet").equals(table)


def test_prompts_have_their_projections_and_scores(results, tmp_path):
    table = results.to_pandas("prompts")
    sets = results.prompts()
    assert table["prompt"].tolist() == [prompt for side in sets.values() for prompt in side]
    harmful = table[table["set"] == "harmful"]
    on = results.projections["refusal"]["harmful"][:, results.layer]
    assert harmful["projection on refusal"].tolist() == on.tolist()
    assert harmful["refusal score"].tolist() == results.causal.requests[0].tolist()
    negative = table[table["set"] == "negative"]["refusal score"].dropna()
    scores = results.causal.ablation.negativity.target_log_odds[0]
    assert sorted(negative) == sorted(scores.tolist())
    table.to_csv(tmp_path / "prompts.csv", index=False)
    assert len(pd.read_csv(tmp_path / "prompts.csv")) == len(table)


def test_saved_results_load_by_a_function_of_that_name(results, tmp_path):
    loaded = load_results(results.save(tmp_path / "run"))
    assert loaded.to_pandas("prompts").equals(results.to_pandas("prompts"))


def test_other_rows_are_refused_by_the_names_there_are(results):
    with pytest.raises(InputError, match="choose 'layers' or 'prompts'"):
        unwrap(type(results).to_pandas)(results, "tokens")
