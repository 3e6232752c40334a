"""Bad and hostile input, function by function and command by command: one line, nothing harmed.

Elsewhere in the tests a type checker stands before every function. Users have none, so it is
switched off here: what they hand over must reach our own checks, and those must be enough.
"""

import ast
import hashlib
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pandas as pd
import pytest
import torch
from checkpoints import byte_tokenizer, write_checkpoint

import refusal_lens as rl
from refusal_lens import plotting
from refusal_lens.activations import disk as artifacts
from refusal_lens.activations.store import Cache
from refusal_lens.cli import main as cli
from refusal_lens.directions import formats
from refusal_lens.experiment.verdict import Thresholds
from refusal_lens.interventions import (
    RefusalTokens,
    ablation_effects,
    addition_effects,
    cross_effects,
    next_token_kl,
)
from refusal_lens.interventions.selection import select_direction
from refusal_lens.models.load import load_tokenizer
from refusal_lens.multiverse.run import run_sensitivity
from refusal_lens.prompts.tokenize import encode_prompts
from refusal_lens.uncertainty import cosine_statistics

PACKAGE = Path(rl.__file__).parent
LAYERS, WIDTH = 3, 6
TOKENS = RefusalTokens((40,), ("I",), "by hand", 1.0, 0.0)
MIXED = "ما هو؟ \u202eevil\u202c 日本"
"""Right-to-left text with an override, and what stands beside it."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_one(value: float, *shape: int) -> torch.Tensor:
    tensor = draw(*shape)
    tensor.view(-1)[-1] = value
    return tensor


A, B = draw(5, LAYERS, WIDTH, seed=1), draw(4, LAYERS, WIDTH, seed=2)
META = torch.empty(5, LAYERS, WIDTH, device="meta")
R, N = draw(LAYERS, WIDTH, seed=3), draw(LAYERS, WIDTH, seed=4)
CURVE = torch.linspace(0, 1, 4)
CONTRAST = rl.Contrast("c", ("How do I rob?", "Why not?"), ("How do I bake?", "Why so?"))
PAIRED = rl.Contrast("c", CONTRAST.target, CONTRAST.baseline, paired=True)
ONE, VECTORS = torch.ones(32), torch.ones(4, 32)
"""Directions that fit the model, at one layer and at each."""


def statistics(*sets: torch.Tensor, **options: Any) -> Any:
    options = {"a_paired": False, "b_paired": False, "n_resamples": 400} | options
    return cosine_statistics(*sets, generator=torch.Generator().manual_seed(0), **options)


def reads(text: str | bytes, name: str = "mine.csv", **options: Any) -> Callable:
    """A contrast from a file that holds this."""

    def call(w):
        columns = {"target": "a", "baseline": "b"} | options
        return rl.contrast_from_file(w.file(name, text), **columns)

    return call


def saved_with(change: Callable[[Any], Any]) -> Callable:
    """A run whose results.json was changed, loaded."""

    def call(w):
        folder = w.copy_of_run()
        document = json.loads((folder / "results.json").read_text("utf-8"))
        content = change(document)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "results.json").write_text(text, "utf-8", "surrogatepass")
        return rl.Results.load(folder)

    return call


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


DIRECTION_CASES = {
    "mean_difference: text": (lambda w: rl.mean_difference(["a"], B), "target is a list"),
    "mean_difference: one axis": (lambda w: rl.mean_difference(A[0, 0], B), r"target has shape \[6\]"),
    "mean_difference: four axes": (lambda w: rl.mean_difference(A[None], B), "hand over a tensor"),
    "mean_difference: whole numbers": (lambda w: rl.mean_difference(A.long(), B), "holds int64"),
    "mean_difference: complex": (lambda w: rl.mean_difference(A + 0j, B), "holds complex64"),
    "mean_difference: NaN": (
        lambda w: rl.mean_difference(with_one(torch.nan, 5, LAYERS, WIDTH), B),
        "row 4 of the target set .* layer 2",
    ),
    "mean_difference: infinity": (
        lambda w: rl.mean_difference(A, with_one(torch.inf, 4, LAYERS, WIDTH)),
        "row 3 of the baseline set",
    ),
    "mean_difference: empty": (lambda w: rl.mean_difference(A[:0], B), "target set is empty"),
    "mean_difference: another width": (lambda w: rl.mean_difference(A, B[..., 1:]), "6 and 5"),
    "mean_difference: another depth": (lambda w: rl.mean_difference(A, B[:, 1:]), "3 and 2"),
    "mean_difference: two devices": (lambda w: rl.mean_difference(A, META), "device, cpu and meta"),
    "whitened_mean_difference: one row": (lambda w: rl.whitened_mean_difference(A[:1], B), "least 2"),
    "whitened_mean_difference: one axis": (lambda w: rl.whitened_mean_difference(A, B[0, 0]), "shape"),
    "paired_principal_component: no pairs": (lambda w: rl.paired_principal_component(A, B), "no pairs"),
    "logistic_probe: few rows": (lambda w: rl.logistic_probe(A, B), "fewer than the 5 folds"),
    "logistic_probe: one fold": (lambda w: rl.logistic_probe(A, B, folds=1), "at least 2 folds"),
    "logistic_probe: a penalty of nought": (
        lambda w: rl.logistic_probe(A, A, penalties=(0.0,)),
        "above 0",
    ),
    "WithinClassCovariance: no class": (lambda w: rl.WithinClassCovariance.of(), "no class"),
    "WithinClassCovariance: two depths": (
        lambda w: rl.WithinClassCovariance.of(A, B[:, 1:]),
        "class 0 and class 1 differ in layer",
    ),
    "WithinClassCovariance: solve for another width": (
        lambda w: rl.WithinClassCovariance.of(A).solve(R[:, 1:]),
        "differ in d_model",
    ),
    "cosine_similarity: other layers": (lambda w: rl.cosine_similarity(R, N[1:]), "differ in layer"),
    "cosine_similarity: one axis": (lambda w: rl.cosine_similarity(R[0], N), r"a has shape \[6\]"),
    "cosine_similarity: whole numbers": (lambda w: rl.cosine_similarity(R.int(), N), "holds int32"),
    "cosine_similarity: text": (lambda w: rl.cosine_similarity("refusal", N), "a is a str"),
    "cosine_similarity: nothing": (lambda w: rl.cosine_similarity(None, N), "a is a NoneType"),
    "cosine_similarity: two devices": (
        lambda w: rl.cosine_similarity(R, torch.empty(3, 6, device="meta")),
        "differ in device, cpu and meta",
    ),
    "cosine_matrix: another width": (lambda w: rl.cosine_matrix(R, N[:, 1:]), "differ in d_model"),
    "concept_map: too few names": (
        lambda w: plotting.concept_map(R[:3, :4, None, None].expand(3, 4, 4, 1), ["one"]),
        "names for",
    ),
    "intervals_by_name: no interval": (
        lambda w: plotting.intervals_by_name({"model": {"joy": (0.1, 0.2)}}),
        "give a number and its two ends",
    ),
    "cosine_matrix: one axis": (lambda w: rl.cosine_matrix(R[0], N), "a has shape"),
    "standardised_cosine: negative variance": (
        lambda w: rl.standardised_cosine(R, N, -torch.ones(3, 6)),
        "below 0",
    ),
    "standardised_cosine: another shape": (
        lambda w: rl.standardised_cosine(R, N, torch.ones(6)),
        "variance has shape",
    ),
    "cosine_without_massive: no such dimension": (
        lambda w: rl.cosine_without_massive(R, N, torch.full((3, 1), 6)),
        "from 0 to 5",
    ),
    "cosine_without_massive: other layers": (
        lambda w: rl.cosine_without_massive(R, N, torch.zeros(2, 1, dtype=torch.long)),
        "for 3 layers",
    ),
    "massive_dimensions: too many": (lambda w: rl.massive_dimensions(A, k=6), "choose from 1"),
    "massive_dimensions: none": (lambda w: rl.massive_dimensions(A[:0], k=1), "no activations"),
    "whitened_cosine: another model's covariance": (
        lambda w: rl.whitened_cosine(R, N, rl.WithinClassCovariance.of(A[..., 1:])),
        "differ in d_model",
    ),
    "causal_cosine: another model's unembedding": (
        lambda w: rl.causal_cosine(R, N, draw(WIDTH + 1, 9)),
        "differ in d_model, 6 and 7",
    ),
    "orthogonal_part: two shapes": (lambda w: rl.orthogonal_part(R, N[1:]), "in layer|of one shape"),
    "cosine_statistics: empty": (lambda w: statistics(A, B, A[:0], B), "set of contrast b is empty"),
    "cosine_statistics: NaN": (
        lambda w: statistics(with_one(torch.nan, 5, LAYERS, WIDTH), B, A, B),
        "row 4 of the target set of contrast a",
    ),
    "cosine_statistics: pairs of two lengths": (
        lambda w: statistics(A, B, A, B, a_paired=True),
        "is paired",
    ),
    "cosine_statistics: another model": (lambda w: statistics(A, B, A, B[..., 1:]), "d_model"),
    "cosine_statistics: no layers": (
        lambda w: statistics(*(x[:, :0] for x in (A, B, A, B))),
        "no layer",
    ),
    "cosine_statistics: few resamples": (lambda w: statistics(A, B, A, B, n_resamples=9), "at least"),
    "cosine_statistics: a confidence of 95": (
        lambda w: statistics(A, B, A, B, confidence=95),
        "between 0 and 1",
    ),
    "analyse: a part is missing": (lambda w: rl.analyse({"refusal": (A, B)}), "lack 'negativity'"),
    "analyse: one side": (lambda w: rl.analyse({"refusal": (A,), "negativity": (A, B)}), "as a pair"),
    "analyse: two models": (
        lambda w: rl.analyse({"refusal": (A, B), "negativity": (A[..., 1:], B[..., 1:])}),
        "of one model",
    ),
    "analyse: NaN": (
        lambda w: rl.analyse(
            {"refusal": (A, B), "negativity": (with_one(torch.nan, 5, LAYERS, WIDTH), B)}
        ),
        "row 4 of the target set",
    ),
    "analyse: no such layer": (
        lambda w: rl.analyse({"refusal": (A, B), "negativity": (A, B)}, config=rl.Config(layer=3)),
        "layer 3 is out of range",
    ),
    "panel: no results": (lambda w: rl.panel(1, w.model), "hand over Results"),
    "judge: thresholds upside down": (
        lambda w: rl.judge(None, Thresholds(margin=0.5, shared_from=0.25)),
        "0 < margin < shared_from",
    ),
}  # fmt: skip

PLOT_CASES = {
    "cosine_by_layer: two axes": (lambda w: plotting.cosine_by_layer(R), "hand over a tensor"),
    "cosine_by_layer: a list": (lambda w: plotting.cosine_by_layer(["a"]), "is a list"),
    "cosine_by_layer: a negative layer": (
        lambda w: plotting.cosine_by_layer(CURVE, highlight=-1),
        "count from 0",
    ),
    "cosine_by_layer: a short band": (
        lambda w: plotting.cosine_by_layer(CURVE, band=(CURVE[1:], CURVE)),
        "differ in layer",
    ),
    "cosine_by_layer: a theme": (lambda w: plotting.cosine_by_layer(CURVE, theme="x"), "theme"),
    "norms_by_layer: negative": (lambda w: plotting.norms_by_layer({"a": -CURVE}), "below 0"),
    "log_odds_by_ablated_layer: a number": (
        lambda w: plotting.log_odds_by_ablated_layer({"a": 1.0}),
        "is a float",
    ),
    "cosine_matrix figure: one axis": (lambda w: plotting.cosine_matrix(CURVE), "matrix has shape"),
    "page: a list of figures": (lambda w: plotting.page([1]), r"\(list\): hand over Figure"),
    "position_by_layer: one axis": (
        lambda w: plotting.position_by_layer(CURVE, quantity="q"),
        "values has shape",
    ),
    "cross_effects: names": (
        lambda w: plotting.cross_effects(R, interventions=["a"], outcomes=["b"]),
        "1 interventions",
    ),
    "dose_response figure: no KL": (
        lambda w: plotting.dose_response({"a": CURVE}, {}),
        "its KL is a NoneType",
    ),
    "prompts_in_plane: two axes": (lambda w: plotting.prompts_in_plane({"a": R}), "has shape"),
    "projections_by_layer: two depths": (
        lambda w: plotting.projections_by_layer({"a": R, "b": R[:, 1:]}),
        "differ in layer",
    ),
    "specification_curve: no choice": (
        lambda w: plotting.specification_curve(pd.DataFrame({"value": [0.1]}), []),
        "no column 'specification'",
    ),
    "selection_scores: an unknown score": (
        lambda w: plotting.selection_scores({"luck": R}),
        "is no score",
    ),
}

TEXT_CASES = {
    "Contrast: empty": (lambda w: rl.Contrast("c", (), ("b",)), "set is empty"),
    "Contrast: a string": (lambda w: rl.Contrast("c", "abc", ("b",)), "give a list of strings"),
    "Contrast: a number among the prompts": (lambda w: rl.Contrast("c", (1,), ("b",)), "not a string"),
    "Contrast: a lone surrogate": (lambda w: rl.Contrast("c", ("a\ud800",), ("b",)), "surrogate"),
    "Contrast: blank": (lambda w: rl.Contrast("c", ("\u2003\n",), ("b",)), "is empty"),
    "Contrast: a prompt on both sides": (lambda w: rl.Contrast("c", ("a",), (" a ",)), "repeats"),
    "Contrast: no name": (lambda w: rl.Contrast("", ("a",), ("b",)), "give a name"),
    "load_contrast: ../": (lambda w: rl.load_contrast("../../etc/passwd"), "no bundled contrast"),
    "bundled_contrasts: a name": (lambda w: rl.bundled_contrasts("refusal"), "too many positional"),
    "load_contrast: a null byte": (lambda w: rl.load_contrast("refusal\0"), "no bundled contrast"),
    "load_prompts: no file": (lambda w: rl.load_prompts(w.folder / "no.txt"), "can't be read"),
    "load_prompts: a folder": (lambda w: rl.load_prompts(w.folder), "neither a `Dataset` dir"),
    "load_prompts: a null byte": (lambda w: rl.load_prompts("a\0.csv:x"), "can't be read|no file"),
    "load_prompts: a name of 5000 letters": (lambda w: rl.load_prompts("x" * 5000), "can't be read"),
    "load_prompts: a link to itself": (lambda w: rl.load_prompts(w.loop()), "can't be read|no file"),
    "load_prompts: several columns": (
        lambda w: rl.load_prompts(w.file("m.csv", "a,b\nx,y\n")),
        "several columns",
    ),
    "contrast_from_prompts: no such column": (
        lambda w: rl.contrast_from_prompts(f"{w.file('m.csv', 'a,b')}:c", "x.csv:y"),
        "no rows|no column",
    ),
    "contrast_from_file: no text": (reads(b"a,b\n\x89\x81,x\n"), "neither UTF-8 nor cp1252"),
    "contrast_from_file: UTF-16 cut": (reads("a,b\nx,y".encode("utf-16")[:-1]), "nor UTF-16 text"),
    "contrast_from_file: a BOM hides no column": (reads(b"\xef\xbb\xbfa,c\nx,y\n"), "no column 'b'"),
    "contrast_from_file: two columns of one name": (reads("a,b,a\nx,y,z\n"), "two columns named 'a'"),
    "contrast_from_file: a quotation left open": (reads('a,b\n"x,y\n'), "quotation mark"),
    "contrast_from_file: a row too long": (reads("a,b\nx,y,z\n"), "saw 3"),
    "contrast_from_file: null bytes": (reads(b"a,b\n\0\0,\0\n\0,y\n", paired=True), "stand once"),
    "contrast_from_file: nothing": (reads(""), "is empty"),
    "contrast_from_file: no such ending": (reads("a", "m.xlsx"), "save it as a"),
    "contrast_from_file: JSON with NaN": (reads('[{"a": NaN, "b": "y"}]', "m.json"), "is empty"),
    "contrast_from_file: deep JSON": (reads("[" * 200_000, "m.json"), "recursion depth"),
    "contrast_from_file: JSON cut short": (reads('[{"a": "x"', "m.json"), "line 1 column"),
    "contrast_from_file: a key twice": (
        reads('[{"a": "x", "a": "y"}]', "m.json"),
        "two columns named 'a'",
    ),
    "contrast_from_file: JSON of a number": (reads("3", "m.json"), "give a list of records"),
    "contrast_from_file: a number of 5000 digits": (reads("9" * 5000, "m.json"), "5000 digits"),
    "contrast_from_file: half a surrogate pair": (
        reads(r'[{"a": "x\ud800", "b": "y"}]', "m.json"),
        "surrogate",
    ),
    "contrast_from_file: one name for both": (reads("a,b\nx,y\n", baseline="a"), "name two different"),
    "contrast_from_dataset: no dataset": (
        lambda w: rl.contrast_from_dataset([1], target="a", baseline="b"),
        "no Hugging Face dataset",
    ),
    "Config: no prompts": (lambda w: rl.Config(max_prompts=0), "at least one"),
    "Config: few resamples": (lambda w: rl.Config(n_resamples=1), "at least"),
    "Config: a confidence of 2": (lambda w: rl.Config(confidence=2.0), "between 0 and 1"),
    "compare_concepts: a concept that does not exist": (
        lambda w: rl.compare_concepts("organism:specific", ["hapiness"]),
        "no bundled contrast 'hapiness'",
    ),
    "compare_concepts: nothing but refusal": (
        lambda w: rl.compare_concepts("organism:specific", ["refusal"]),
        "nothing to compare 'refusal' with: name another concept",
    ),
    "Atlas: a folder without one": (lambda w: rl.Atlas.load(w.folder), "no file .*atlas.json"),
    "Atlas: a list": (
        lambda w: rl.Atlas.load(w.file("x/atlas.json", "[]").parent),
        "no file .*atlas.safetensors",
    ),
    "harm_and_refusal: replies of one kind": (
        lambda w: rl.harm_and_refusal(w.model, CONTRAST, progress=False),
        "replies are .*: add prompts",
    ),
    "run_experiment: a dtype": (
        lambda w: rl.run_experiment(rl.Config(model="organism:specific", dtype="int8")),
        "dtype is int8",
    ),
    "Config: no such contrast": (lambda w: rl.Config(refusal="refusl").contrasts(), "did you mean"),
    "Config: prompts shared": (lambda w: rl.Config(negativity="refusal").contrasts(), "share"),
    "Protocol: a position of nought": (lambda w: rl.Protocol(positions=(0,)), "count from the end"),
    "Protocol: a list": (lambda w: rl.Protocol(positions=[-1.5]), "positions has -1.5"),
    "Protocol: an unknown key": (lambda w: rl.Protocol(x=1), "is named 'x'"),
    "Protocol: a known bug": (lambda w: rl.Protocol(bos="twice"), "has a known bug"),
}  # fmt: skip

MODEL_CASES = {
    "build_inputs_with_chat_template: none": (
        lambda w: rl.build_inputs_with_chat_template(w.tokenizer, []),
        "no prompts",
    ),
    "build_inputs_with_chat_template: a lone surrogate": (
        lambda w: rl.build_inputs_with_chat_template(w.tokenizer, ["a\ud800"]),
        "half a surrogate pair",
    ),
    "build_inputs_with_chat_template: bytes": (
        lambda w: rl.build_inputs_with_chat_template(w.tokenizer, [b"a"]),
        "not a string",
    ),
    "build_inputs_with_chat_template: before the prompt": (
        lambda w: rl.build_inputs_with_chat_template(
            w.tokenizer, ["a"], protocol=rl.Protocol(positions=(-500,))
        ),
        "before the start",
    ),
    "show_tokens: a template that fails": (
        lambda w: rl.show_tokens(
            w.tokenizer, "a", protocol=rl.Protocol(chat_template="{{ 1 / 0 }}")
        ),
        "template fails: division by zero",
    ),
    "show_tokens: no template in Jinja": (
        lambda w: rl.show_tokens(w.tokenizer, "a", protocol=rl.Protocol(chat_template="{% if %}")),
        "template fails",
    ),
    "get_prompt_activations: none": (
        lambda w: rl.get_prompt_activations(w.model, [], progress=False),
        "no prompts",
    ),
    "get_prompt_activations: a string": (
        lambda w: rl.get_prompt_activations(w.model, "abc", progress=False),
        "single string",
    ),
    "get_prompt_activations: 1 MB": (
        lambda w: rl.get_prompt_activations(w.model, ["x" * 2**20], progress=False),
        "tokens",
    ),
    "get_prompt_activations: over the context": (
        lambda w: rl.get_prompt_activations(w.model, ["a", "x" * 200], progress=False),
        "prompt 1 .*tokens",
    ),
    "get_prompt_activations: a batch of nought": (
        lambda w: rl.get_prompt_activations(w.model, ["a"], batch_size=0, progress=False),
        "batch_size is 0",
    ),
    "get_prompt_activations: a negative batch": (
        lambda w: rl.get_prompt_activations(w.model, ["a"], batch_size=-3, progress=False),
        "batch_size is -3",
    ),
    "get_layer_activations: several positions": (
        lambda w: rl.get_layer_activations(
            w.model, CONTRAST, protocol=rl.Protocol(positions=(-1, -2)), progress=False
        ),
        "one position",
    ),
    "extract: one name twice": (
        lambda w: rl.extract(w.model, [CONTRAST, CONTRAST], progress=False),
        "same name",
    ),
    "ablate_direction: another model": (lambda w: rl.ablate_direction(w.model, R[0]), "model's 32"),
    "ablate_direction: NaN": (
        lambda w: rl.ablate_direction(w.model, torch.full((32,), torch.nan)),
        "NaN or infinite",
    ),
    "ablate_direction: zero": (lambda w: rl.ablate_direction(w.model, torch.zeros(32)), "is zero"),
    "ablate_direction: a number": (
        lambda w: rl.ablate_direction(w.model, torch.tensor(1.0)),
        "direction has shape",
    ),
    "add_direction: no such layer": (
        lambda w: rl.add_direction(w.model, torch.ones(32), 4),
        "no layer 4",
    ),
    "add_direction: whole numbers": (
        lambda w: rl.add_direction(w.model, torch.ones(32, dtype=torch.int), 1),
        "holds int32",
    ),
    "find_refusal_tokens: one prompt": (
        lambda w: rl.find_refusal_tokens(w.model, ["a"], ["b"], progress=False),
        "at least two",
    ),
    "refusal_log_odds: no such token": (
        lambda w: rl.refusal_log_odds(draw(2, 9), [9]),
        "no token of this vocabulary",
    ),
    "refusal_log_odds: text": (lambda w: rl.refusal_log_odds(["a"], [0]), "logits is a list"),
    "next_token_kl: two vocabularies": (
        lambda w: next_token_kl(draw(2, 9), draw(2, 8)),
        "differ in d_vocab",
    ),
    "ablation_effects: another width": (
        lambda w: ablation_effects(w.model, ["a"], R, score=TOKENS, progress=False),
        "does not fit",
    ),
    "ablation_effects: no prompts": (
        lambda w: ablation_effects(w.model, [], torch.ones(1, 32), score=TOKENS, progress=False),
        "no prompts",
    ),
    "addition_effects: layers that don't fit": (
        lambda w: addition_effects(
            w.model,
            ["a"],
            torch.ones(2, 32),
            torch.arange(3),
            score=TOKENS,
            progress=False,
        ),
        "one layer to each",
    ),
    "dose_response: no such layer": (
        lambda w: rl.dose_response(w.model, CONTRAST, CONTRAST, layer=9, progress=False),
        "no layer 9",
    ),
    "interventions.cross_effects: no such layer": (
        lambda w: cross_effects(
            w.model,
            (CONTRAST, CONTRAST),
            ((A, B), (A, B)),
            intervention="ablation",
            layer=9,
            random=R[:, :WIDTH],
            score=TOKENS,
            progress=False,
        ),
        "no layer 9",
    ),
    "select_direction: too few prompts": (
        lambda w: select_direction(w.model, CONTRAST, progress=False),
        "too small",
    ),
    "run_sensitivity: no such layer": (
        lambda w: run_sensitivity(w.model, (CONTRAST, CONTRAST), layer=9, progress=False),
        "layer 9 is out of range",
    ),
    "run_experiment: no such layer": (
        lambda w: rl.run_experiment(rl.Config(layer=99), model=w.model, progress=False),
        "layer 99 is out of range",
    ),
    "run_experiment: several positions": (
        lambda w: rl.run_experiment(
            rl.Config(protocol=rl.Protocol(positions=(-1, -2))), model=w.model, progress=False
        ),
        "one position",
    ),
    "main: no such organism": (lambda w: rl.main(rl.Config(model="organism:x")), "organism"),
    "load_model: ../": (lambda w: rl.load_model("organism:../../data"), "organism"),
    "load_model: no name": (lambda w: rl.load_model(""), "is no model"),
    "load_model: a null byte": (lambda w: rl.load_model("a\0b"), "is no model"),
    "load_model: a file": (
        lambda w: rl.load_model(str(w.file("m.bin", b"x"))),
        "is no GGUF file",
    ),
    "load_model: an empty folder": (
        lambda w: rl.load_model(str(w.made("nothing"))),
        "no config.json",
    ),
    "load_model: no device": (
        lambda w: rl.load_model("organism:specific", device="toaster"),
        "is no device",
    ),
    "load_model: deep JSON": (
        lambda w: rl.load_model(str(w.file("model/config.json", "[" * 100_000).parent)),
        "configuration of .* can't be read",
    ),
    "load_model: a lying weight file": (
        lambda w: rl.load_model(str(w.lying_weights())),
        "header too large",
    ),
    "from_hugging_face: no model": (lambda w: rl.from_hugging_face("gpt2", None), "str is no"),
    "encode_prompts: no chat template": (
        lambda w: encode_prompts(byte_tokenizer(chat_template=None), ["a"]),
        "chat template",
    ),
    "load_tokenizer: no tokenizer": (
        lambda w: load_tokenizer(str(w.made("none"))),
        "no config.json",
    ),
}


def replies(w: Any, prompts: Any = "Hi.", **options: Any) -> Any:
    return rl.compare_replies(w.model, prompts, **{"add": VECTORS, "layer": 1} | options)


def writes(w: Any, direction: Any = ONE, layer: Any = 1, **options: Any) -> Any:
    return rl.component_writes(w.model, CONTRAST, direction, layer, progress=False, **options)


def exchange(w: Any, names: Any = ("L0H0",), direction: Any = ONE, **options: Any) -> Any:
    given = {"contrast": PAIRED, "tokens": [40]} | options
    return rl.interchange(
        w.model, given["contrast"], names, direction, given["tokens"], progress=False
    )


IN_HAND_CASES = {
    "Direction: text": (lambda w: rl.Direction("refusal"), "vectors is a str"),
    "Direction: a number": (lambda w: rl.Direction(torch.tensor(1.0)), r"vectors has shape \[\]"),
    "Direction: complex": (lambda w: rl.Direction(VECTORS + 0j), "holds complex64"),
    "Direction: layers as letters": (
        lambda w: rl.Direction(VECTORS, layers="abcd"),
        "whole numbers",
    ),
    "Direction: half a layer": (lambda w: rl.Direction(ONE, layers=1.5), "layers is 1.5"),
    "Direction: a model of nothing": (lambda w: rl.Direction(ONE, model=3), "int has no hooks"),
    "Direction: a model's null byte": (lambda w: rl.Direction(ONE, model="a\0b"), "is no model"),
    "Direction: a contrast of nothing": (
        lambda w: rl.Direction(ONE, contrast=3),
        "3 is no contrast",
    ),
    "Direction: a protocol's name": (
        lambda w: rl.Direction(ONE, protocol="arditi"),
        "hand over Protocol",
    ),
    "Direction: of, an estimator's name": (
        lambda w: rl.Direction.of(w.model, CONTRAST, estimator="mean", progress=False),
        "estimator is 'mean'",
    ),
    "Direction: of, an unknown option": (
        lambda w: rl.Direction.of(w.model, CONTRAST, batch=3),
        "mean 'batch_size'",
    ),
    "Direction: load, an unknown option": (
        lambda w: rl.Direction.load(w.folder / "no.npy", layers=3),
        "mean 'layer'",
    ),
    "Direction: load, a pickle that runs code": (
        lambda w: rl.Direction.load(w.pickled("d.pt")),
        "archive|asks for|not a zip file",
    ),
    "Direction: save below a file": (
        lambda w: rl.Direction(ONE, 1).save(w.file("f", b"x") / "d.npy"),
        "can't write",
    ),
    "Direction: save with another ending": (
        lambda w: rl.Direction(ONE, 1).save(w.folder / "d.pt"),
        "are written as",
    ),
    "Direction: project nothing": (
        lambda w: rl.Direction(VECTORS, model=w.model).project([]),
        r"activations \[0\]",
    ),
    "Direction: project prompts at a layer too deep": (
        lambda w: rl.Direction(VECTORS, [2, 3, 4, 5], model=w.model).project("Hi."),
        "has layers 2 to 5: resid_post of prompts has layers 0 to 3",
    ),
    "Direction: project prompts at the embedding": (
        lambda w: rl.Direction(VECTORS, range(-1, 3), model=w.model).project("Hi."),
        "has layers -1 to 2: resid_post of prompts has layers 0 to 3",
    ),
    "Direction: project prompts at an unknown layer": (
        lambda w: rl.Direction(ONE, model=w.model).project("Hi."),
        "no known layer",
    ),
    "Direction: add the model": (
        lambda w: rl.Direction(ONE, 1).add(w.model),
        "hand over float",
    ),
    "Direction: top tokens of another width": (
        lambda w: rl.Direction(R[0]).top_tokens(3, w.model),
        "model's 32",
    ),
    "compare_replies: nothing to compare": (lambda w: replies(w, add=None), "nothing to compare"),
    "compare_replies: no prompts": (lambda w: replies(w, []), "no prompts"),
    "compare_replies: a lone surrogate": (lambda w: replies(w, "a\ud800"), "half a surrogate"),
    "compare_replies: over the context": (lambda w: replies(w, "x" * 200), "context holds 128"),
    "compare_replies: a reply over the context": (
        lambda w: replies(w, max_tokens=10**6),
        "lower max_tokens",
    ),
    "compare_replies: another width": (lambda w: replies(w, add=R[0]), "model's 32"),
    "compare_replies: NaN": (lambda w: replies(w, add=ONE * torch.nan), "NaN or infinite"),
    "compare_replies: an infinite coefficient": (
        lambda w: replies(w, coefficient=float("inf")),
        "NaN or infinite",
    ),
    "compare_replies: no such layer": (lambda w: replies(w, add=ONE, layer=9), "no layer 9"),
    "component_writes: all layers": (lambda w: writes(w, VECTORS), r"such as direction\[layer\]"),
    "component_writes: zero": (lambda w: writes(w, ONE * 0), "is zero"),
    "component_writes: another model": (lambda w: writes(w, R[0]), "model's 32"),
    "component_writes: no such layer": (lambda w: writes(w, layer=4), "no layer 4"),
    "component_writes: a confidence of 95": (lambda w: writes(w, confidence=95), "between 0 and 1"),
    "component_writes: a protocol's name": (
        lambda w: writes(w, protocol="arditi"),
        "hand over Protocol",
    ),
    "component_writes: an unknown option": (lambda w: writes(w, batch=3), "mean 'batch_size'"),
    "same_writers: two layers": (
        lambda w: rl.same_writers(writes(w, layer=1), writes(w, layer=3), k=2),
        "components differ",
    ),
    "same_writers: the top none": (
        lambda w: rl.same_writers(writes(w), writes(w), k=0),
        "at least 1",
    ),
    "same_writers: directions": (
        lambda w: rl.same_writers(ONE, ONE),
        r"\(Tensor\): hand over Components",
    ),
    "interchange: no pairs": (lambda w: exchange(w, contrast=CONTRAST), "no pairs"),
    "interchange: no such head": (lambda w: exchange(w, ["L9H0"]), "no component 'L9H0'"),
    "interchange: all layers": (
        lambda w: exchange(w, direction=VECTORS),
        r"such as direction\[layer\]",
    ),
    "interchange: no such token": (lambda w: exchange(w, tokens=[10**6]), "no token of this"),
    "interchange: a token's text": (lambda w: exchange(w, tokens="I"), "give ids"),
    "logit_lens: one layer": (lambda w: rl.logit_lens(w.model, ONE), r"has shape \[32\]"),
    "logit_lens: no tokens": (lambda w: rl.logit_lens(w.model, VECTORS, k=0), "from 1 to 272"),
    "logit_lens: over the vocabulary": (
        lambda w: rl.logit_lens(w.model, VECTORS, k=273),
        "from 1 to 272",
    ),
    "without_direct_effect: no tokens": (
        lambda w: rl.without_direct_effect(w.model, ONE, []),
        "give ids",
    ),
    "without_direct_effect: a token's text": (
        lambda w: rl.without_direct_effect(w.model, ONE, "I"),
        "give ids",
    ),
    "without_direct_effect: another model": (
        lambda w: rl.without_direct_effect(w.model, R, [40]),
        "model's 32",
    ),
}

FILE_CASES = {
    "load_results: no folder": (lambda w: rl.load_results(w.folder / "no"), "no file"),
    "load_results: tensors cut short": (lambda w: rl.load_results(w.cut_run()), "safetensors"),
    "config_of: another format": (lambda w: rl.config_of(w.file("r.json", "{}")), "not of format"),
    "config_of: no file": (lambda w: rl.config_of(w.folder / "no"), "no file"),
    "write_report: below a file": (
        lambda w: rl.write_report(w.results, w.file("r", b"x") / "y.html"),
        "can't write",
    ),
    "Results: no folder": (lambda w: rl.Results.load(w.folder / "no"), "no file"),
    "Results: a file": (lambda w: rl.Results.load(w.file("r.json", "{}")), "can't be read"),
    "Results: not JSON": (saved_with(lambda d: "{"), "as JSON: .*line 1 column"),
    "Results: deep JSON": (saved_with(lambda d: "[" * 200_000), "recursion depth"),
    "Results: a list": (saved_with(lambda d: [d]), "not of format"),
    "Results: another format": (saved_with(lambda d: d | {"format": 99}), "not of format"),
    "Results: an unknown type": (
        saved_with(lambda d: d | {"saved": {"type": "Popen", "fields": {}}}),
        "unknown 'Popen'",
    ),
    "Results: an unknown field": (
        saved_with(lambda d: d | {"saved": {"type": "Protocol", "fields": {"x": 1}}}),
        "needs another version",
    ),
    "Results: a tensor with ../": (
        saved_with(lambda d: d | {"saved": {"tensor": "../../etc/passwd"}}),
        "lack the tensor",
    ),
    "Results: something else": (
        saved_with(lambda d: d | {"saved": {"type": "Protocol", "fields": {}}}),
        "holds no results",
    ),
    "Results: a number that is none": (
        saved_with(lambda d: d | {"saved": {"float": "rm -rf"}}),
        "can't be read",
    ),
    "Results: half a character": (
        saved_with(lambda d: '{"format": "\ud800"}'),
        "can't be read|not of format",
    ),
    "Results: tensors cut short": (lambda w: rl.Results.load(w.cut_run()), "safetensors"),
    "Results: save to a file": (lambda w: w.results.save(w.file("r", b"x")), "can't write"),
    "Results: save below a file": (
        lambda w: w.results.save(w.file("r", b"x") / "y"),
        "can't write",
    ),
    "Results: save to a null byte": (lambda w: w.results.save("a\0b"), "can't write"),
    "Results: save to a loop": (lambda w: w.results.save(w.loop() / "x"), "can't write"),
    "Results: save without permission": (lambda w: w.results.save("/proc/nowhere"), "can't write"),
    "Results: save on a full disk": (lambda w: w.on_a_full_disk(w.results.save), "can't write"),
    "Cache: a file": (lambda w: Cache(w.file("c", b"x")), "is a file"),
    "read_directions: a pickle that runs code": (
        lambda w: formats.read_directions(w.pickled("d.pt")),
        "archive|asks for|not a zip file",
    ),
    "read_directions: a link to itself": (lambda w: formats.read_directions(w.loop()), "no file"),
    "read_directions: another ending": (
        lambda w: formats.read_directions(w.file("d.exe", b"MZ")),
        "not this ending",
    ),
    "read_directions: safetensors of 2^60 bytes": (
        lambda w: formats.read_directions(w.file("d.safetensors", b"\0\0\0\0\0\0\0\x10{}")),
        "safetensors",
    ),
    "write_directions: another ending": (
        lambda w: formats.write_directions(some_directions(), w.folder / "d.pt"),
        "are written as",
    ),
    "write_control_vector: unknown layers": (
        lambda w: formats.write_control_vector(
            some_directions(None), w.folder / "d.gguf", model_type="llama"
        ),
        "which layers",
    ),
    "compare: another width": (
        lambda w: formats.compare(some_directions(), some_directions(width=7)),
        "can't be compared",
    ),
    "read_tensors: no file": (lambda w: artifacts.read_tensors(w.folder / "no"), "no file"),
}


def some_directions(layers: tuple[int, ...] | None = (0, 1), width: int = 6) -> Any:
    return formats.Directions(draw(2, width), layers, "here")


CASES = DIRECTION_CASES | PLOT_CASES | TEXT_CASES | MODEL_CASES | IN_HAND_CASES | FILE_CASES
NO_INPUT = {"ContrastActivations", "CosineStatistics", "InputError", "Selection", "Sensitivity"}
NO_INPUT |= {"Verdict", "formats", "plotting"}
"""Public names that only hold what another function gave, or others' functions."""


# What the cases are tried on


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("model") / "random")
    return rl.load_model(str(path), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def results():
    sides = [draw(6, LAYERS, WIDTH, seed=seed) + seed % 2 for seed in range(4)]
    activations = {"refusal": (sides[1], sides[0]), "negativity": (sides[3], sides[2])}
    return rl.analyse(activations, config=rl.Config(n_resamples=400))


@pytest.fixture(scope="module")
def a_run(results, tmp_path_factory):
    return results.save(tmp_path_factory.mktemp("earlier") / "run")


class World:
    """A folder with an earlier run in it, a model, and the means of making hostile files."""

    def __init__(self, folder: Path, lens: Any, results: Any, run: Path):
        self.folder, self.model, self.results, self.run = folder, lens, results, run
        self.mark = folder / "it ran"
        self.tokenizer = lens.tokenizer

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def made(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def loop(self) -> Path:
        (self.folder / "loop").symlink_to(self.folder / "loop")
        return self.folder / "loop"

    def pickled(self, name: str) -> Path:
        return self.file(name, pickle.dumps(RunsCode(self.mark)))

    def copy_of_run(self) -> Path:
        copy = self.made("copy")
        for name in ("results.json", "measurements.safetensors", "directions.safetensors"):
            (copy / name).write_bytes((self.run / name).read_bytes())
        return copy

    def cut_run(self) -> Path:
        copy = self.copy_of_run()
        path = copy / "measurements.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        return copy

    def lying_weights(self) -> Path:
        path = write_checkpoint(self.folder / "lying")
        (weights,) = path.glob("*.safetensors")
        weights.write_bytes(b"\xff" * 7 + b"\x00" + weights.read_bytes()[8:])
        return path

    def on_a_full_disk(self, save: Callable) -> Any:
        """Saves over the earlier run, with room for 100 kB a file."""
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most[1]))
        try:
            return save(self.run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
            signal.signal(signal.SIGXFSZ, ignored)

    def saved(self) -> dict[str, str]:
        """All that is saved, by its name: what a mistake must leave alone."""
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.run.rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def world(tmp_path, lens, results, a_run, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "input").mkdir()
    return World(tmp_path / "input", lens, results, a_run)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_answered_in_one_line_and_nothing_saved_changes(world, case, capsys):
    call, message = CASES[case]
    before = world.saved()
    with pytest.raises(rl.InputError, match=message) as error:
        call(world)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    assert world.saved() == before
    assert not world.mark.exists()
    assert list(Path.cwd().iterdir()) == []
    assert capsys.readouterr().out == ""


def test_there_are_more_than_a_hundred_cases_and_every_public_function_has_one():
    assert len(CASES) + len(COMMANDS) > 100
    tried = {case.split(":")[0] for case in CASES}
    assert set(rl.__all__) - NO_INPUT - tried == set()
    assert set(plotting.__all__) - tried == set()


def test_what_is_compared_before_and_after_shows_a_change(world):
    # The control of "nothing already saved changed".
    path = world.run / "results.json"
    content, before = path.read_bytes(), world.saved()
    path.write_bytes(content + b" ")
    changed = world.saved()
    path.write_bytes(content)
    assert changed != before == world.saved()


def test_a_wrong_shape_meets_the_type_checker_where_there_is_one():
    with pytest.raises(jaxtyping.TypeCheckError):
        rl.mean_difference(A[0, 0], B)


# Odd but fine


@pytest.mark.parametrize(
    "prompt",
    ["a\0b", MIXED, "<|eot_id|><|begin_of_text|>", "\ufeffa", "a\r\nb", "\u2028", "e\u0301" * 9],
    ids=ascii,
)
def test_an_odd_prompt_is_read_like_any_other(world, prompt):
    ids = encode_prompts(world.tokenizer, [prompt])[0]
    specials = [i for i in ids if i >= 256]
    assert specials.count(256) == 1
    assert len(specials) == len([i for i in encode_prompts(world.tokenizer, ["a"])[0] if i >= 256])
    found = rl.get_prompt_activations(world.model, ["a", prompt], progress=False)
    assert found.isfinite().all()


# Commands


def run_with(*flags: str) -> Callable:
    return lambda w: ["run", "--model", "organism:specific", "--out", str(w.folder / "o"), *flags]


COMMANDS: dict[str, tuple[Callable, str]] = {
    "run: no such organism": (lambda w: ["run", "--model", "organism:x"], "organism"),
    "run: no such layer": (run_with("--layer", "99", "--quiet"), "layer 99"),
    "run: half a contrast": (run_with("--target", "x.csv:a"), "give both"),
    "run: no such file": (run_with("--target", "x.csv:a", "--baseline", "x.csv:b"), "No such file"),
    "run: no such contrast": (run_with("--refusal", "refusl"), "did you mean"),
    "run: one contrast twice": (run_with("--against", "refusal"), "share"),
    "run: a position": (run_with("--position", "0"), "count from the end"),
    "run: a dtype": (run_with("--dtype", "int8"), "dtype is int8: .*floating-point"),
    "run: a device": (run_with("--device", "toaster"), "is no device"),
    "run: few resamples": (run_with("--resamples", "3"), "at least"),
    "run: no prompts": (run_with("--max-prompts", "0"), "at least one"),
    "run: a confidence of 95": (run_with("--confidence", "95"), "between 0 and 1"),
    "run: out is a file": (
        lambda w: ["run", "--model", "organism:specific", "--out", str(w.file("o", b"x"))],
        "can't write",
    ),
    "demo: out is a file": (lambda w: ["demo", "--out", str(w.file("o", b"x"))], "can't write"),
    "demo: no prompts": (lambda w: ["demo", "--max-prompts", "0"], "at least one"),
    "tokens: a position": (lambda w: ["tokens", "hi", "--position", "-900"], "before the start"),
    "tokens: a lone surrogate": (lambda w: ["tokens", "a\udc80"], "half a surrogate"),
    "tokens: no such model": (
        lambda w: ["tokens", "a", "--model", str(w.made("m"))],
        "no config.json",
    ),
    "compare: no file": (lambda w: ["compare", "a.pt", "b.pt"], "no file a.pt"),
    "compare: which contrast": (lambda w: ["compare", str(w.run), str(w.run)], "name one with"),
    "compare: a pickle that runs code": (
        lambda w: ["compare", str(w.pickled("a.pt")), "b.pt"],
        "archive",
    ),
    "compare: not a position": (
        lambda w: ["compare", str(w.file("a.npy", b"\x93NUMPY")), "b", "--a.position", "x"],
        "can't be read",
    ),
    "convert: another ending": (lambda w: ["convert", "a.pt", "b.txt"], "not this ending"),
    "convert: a control vector of no model": (
        lambda w: ["convert", "a.pt", "b.gguf"],
        "--model-type, such as llama",
    ),
    "convert: a model type of no control vector": (
        lambda w: ["convert", "a.pt", "b.npy", "--model-type", "llama"],
        "is for .gguf alone",
    ),
    "convert: damage over an earlier file": (
        lambda w: ["convert", str(w.file("a.pt", b"x")), str(w.run / "directions.safetensors")],
        "archive",
    ),
    "convert: out in a file": (
        lambda w: [
            *("convert", str(w.run), str(w.file("o", b"x") / "d.npy"), "--key", "refusal"),
        ],
        "can't write",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_with_bad_input_ends_with_one_line_and_status_2(world, case, capsys):
    arguments, message = COMMANDS[case]
    line, before = arguments(world), world.saved()
    with pytest.raises(SystemExit) as end:
        cli.main(line)
    shown = capsys.readouterr()
    assert end.value.code == 2
    # transformers looks but once, when it is imported, whether its progress bars are wanted.
    shown_lines = [
        line for line in shown.err.splitlines() if line and "Loading weights" not in line
    ]
    (line,) = shown_lines
    assert line.startswith("refusal-lens: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    assert shown.out == ""
    assert world.saved() == before
    assert not world.mark.exists()


@pytest.mark.parametrize(
    "arguments",
    [["run", "--laye", "3"], ["fly"], ["run", "--layer", "x"], ["compare", "a"], ["convert"]],
    ids=" ".join,
)
def test_an_unknown_flag_command_or_value_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_directions_are_compared_and_converted(world, capsys):
    out = world.folder / "refusal.npy"
    cli.main(["convert", str(world.run), str(out), "--key", "refusal"])
    assert f"Written to {out}" in capsys.readouterr().out
    read = formats.read_directions(out)
    assert read.layers == (0, 1, 2)
    torch.testing.assert_close(read.vectors, world.results.directions["refusal"])
    cli.main(["compare", str(out), str(world.run), "--b.key", "negativity"])
    shown = capsys.readouterr().out
    cosine = world.results.similarities["refusal_vs_negativity"]
    assert f"    2  {float(cosine[2]):+.4f}" in shown
    assert "layer   cosine" in shown


def test_a_control_vector_is_written_on_the_command_line(world, capsys):
    pytest.importorskip("gguf")
    out = world.folder / "refusal.gguf"
    cli.main(["convert", str(world.run), str(out), "--key", "refusal", "--model-type", "llama"])
    read = formats.read_directions(out)
    assert torch.equal(read.vectors, world.results.directions["refusal"][1:])
    assert read.contrast == "refusal"
    assert "layer 0 left out" in capsys.readouterr().out


# Stopping, and saying no more than was asked for


COMMAND = [sys.executable, "-m", "refusal_lens"]


def test_ctrl_c_while_importing_ends_with_one_line_too(tmp_path):
    # What the command imports first is interrupted, at a moment that no timing can miss.
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-m", "refusal_lens", "demo"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (130, "refusal-lens: stopped\n")


def test_ctrl_c_ends_with_one_line_and_status_130(tmp_path):
    code = (
        "import os, signal, sys, threading\n"
        "import refusal_lens\n"
        "from refusal_lens.__main__ import main\n"
        "def stopped(*_, **__):\n"
        "    print('working', flush=True)\n"
        "    signal.pause()\n"
        # A shell starts what it runs in the background with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "refusal_lens.run_experiment = stopped\n"
        f"main(['demo', '--out', {str(tmp_path / 'out')!r}])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        try:
            _, shown = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, shown) == (130, "refusal-lens: stopped\n")


def test_a_broken_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "tokens", "hello"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_library_prints_nothing_itself():
    allowed = {("experiment/run.py", "main")}
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        inside = {id(n): f.name for f in functions for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                found.add((file.relative_to(PACKAGE).as_posix(), inside.get(id(node))))
    programs = ("cli/", "__main__.py", "organisms/train.py")
    assert any(file.startswith("cli/") for file, _ in found)  # the control: prints are found
    assert {one for one in found if not one[0].startswith(programs)} == allowed


def test_a_run_says_nothing_but_through_logging(world, capsys, caplog):
    with caplog.at_level(logging.DEBUG, logger="refusal_lens"):
        config = rl.Config(max_prompts=4, n_resamples=400, interventions=False)
        rl.run_experiment(config, model=world.model, progress=False)
    assert capsys.readouterr() == ("", "")
    assert any("running the prompts of refusal" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"warned"}),
        (["--quiet"], set()),
        (["--verbose"], {"warned", "told"}),
    ],
    ids=str,
)
def test_the_log_is_shown_as_asked_for(world, monkeypatch, capsys, flags, expected):
    def speak(*_: Any, **__: Any) -> Any:
        logger = logging.getLogger("refusal_lens.experiment")
        logger.info("told")
        logger.warning("warned")
        return world.results

    monkeypatch.setattr(rl, "run_experiment", speak)
    cli.main(["run", "--out", str(world.folder / "out"), *flags])
    shown = capsys.readouterr().err.splitlines()
    assert set(shown) == {f"refusal-lens: {word}" for word in expected}
    assert logging.getLogger("refusal_lens").handlers == []  # as it was
