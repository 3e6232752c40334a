"""What people type: each call below works, or says in one line what to write instead.

The tests' type checker is switched off here: users have none.
"""

from functools import cache

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch

import refusal_lens as rl

R = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
N = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
A = torch.randn(6, 32, 64, generator=torch.Generator().manual_seed(2))
B = torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(3))
COSINE = rl.cosine_similarity(R, N)
D = rl.Direction(R)
NAME = "organism:specific"
TABLE = pd.DataFrame({"rude": ["Go away.", "Be quiet."], "kind": ["Please stay.", None]})
QUICK = {"progress": False}


def same(a, b) -> bool:
    return torch.equal(torch.as_tensor(a).double(), torch.as_tensor(b).double())


CURVE = COSINE.numpy()


@cache
def results() -> rl.Results:
    target = (R + A[0]).expand(8, 32, 64) + torch.randn(
        8, 32, 64, generator=torch.Generator().manual_seed(4)
    )
    sets = {"refusal": (target, -target), "negativity": (target.flip(0), target / 2)}
    return rl.analyse(sets, config=rl.Config(n_resamples=400))


def chart_values(figure) -> list[float]:
    return [value for trace in figure.data if trace.name for value in trace.y[:3]]


WORKS = {
    "cosine_similarity: one layer": lambda m: same(rl.cosine_similarity(R[20], N[20]), COSINE[20]),
    "plotting: an array": lambda m: (
        chart_values(rl.plotting.cosine_by_layer(CURVE))
        == chart_values(rl.plotting.cosine_by_layer(COSINE))
    ),
    "plotting: a mapping of lists": lambda m: (
        len(rl.plotting.cosine_by_layer({"a": CURVE.tolist(), "b": CURVE}, highlight="3").data) > 1
    ),
    "plotting: an interval of arrays": lambda m: (
        rl.plotting.cosine_by_layer(CURVE, interval=(CURVE - 0.1, CURVE + 0.1)).data
    ),
    "plotting: a matrix": lambda m: rl.plotting.cosine_matrix(np.eye(32)).data,
    "plotting: norms of a Direction": lambda m: rl.plotting.norms_by_layer(D.norm(dim=-1)).data,
    "run_experiment: a name and options": lambda m: (
        rl.run_experiment(
            NAME, against="arousal", max_prompts=4, interventions=False, resamples=400, **QUICK
        ).names.negativity
        == "arousal"
    ),
    "cosine_similarity: arrays": lambda m: same(rl.cosine_similarity(R.numpy(), N.numpy()), COSINE),
    "cosine_similarity: lists": lambda m: same(rl.cosine_similarity(R.tolist(), N), COSINE),
    "cosine_similarity: lists of tensors": lambda m: same(rl.cosine_similarity([*R], N), COSINE),
    "cosine_similarity: Directions": lambda m: same(
        rl.cosine_similarity(D, rl.Direction(N)), COSINE
    ),
    "cosine_similarity: a DataFrame": lambda m: same(
        rl.cosine_similarity(pd.DataFrame(R.numpy()), N), COSINE
    ),
    "cosine_similarity: by name": lambda m: same(rl.cosine_similarity(b=N, a=R), COSINE),
    "cosine_matrix: arrays": lambda m: rl.cosine_matrix(R.numpy(), D).shape == (32, 32),
    "mean_difference: arrays": lambda m: same(
        rl.mean_difference(A.numpy(), B.numpy()), rl.mean_difference(A, B)
    ),
    "mean_difference: lists": lambda m: (
        rl.mean_difference([[[1, 2]]], [[[0, 0]]]).tolist() == [[1, 2]]
    ),
    "orthogonal_part: an array": lambda m: rl.orthogonal_part(R[0].numpy(), N[0]).shape == (64,),
    "massive_dimensions: k as text": lambda m: rl.massive_dimensions(A, k="2").shape == (32, 2),
    "cosine_without_massive: an array": lambda m: (
        rl.cosine_without_massive(R, N, np.zeros((32, 1), int)).shape == (32,)
    ),
    "cosine_statistics: without a generator": lambda m: (
        rl.cosine_statistics(
            A, B, A + 1, B - 1, a_paired=False, b_paired=False, n_resamples=400
        ).plain.shape
        == (32,)
    ),
    "cosine_statistics: a seed": lambda m: (
        rl.cosine_statistics(
            *(A, B, A + 1, B - 1), a_paired=False, b_paired=False, n_resamples=400, generator=7
        ).plain.shape
        == (32,)
    ),
    "refusal_log_odds: a list": lambda m: rl.refusal_log_odds([0.0, 1.0], [0]) < 0,
    "load_contrast and its names": lambda m: (
        rl.load_contrast(rl.bundled_contrasts()[1]).name == "negativity"
    ),
    "get_layer_activations: two names": lambda m: (
        rl.get_layer_activations(NAME, "refusal", **QUICK).target.shape[1:] == (32, 64)
    ),
    "extract: a table": lambda m: (
        rl.extract(m, [TABLE], **QUICK)["contrast"].baseline.shape == (1, 32, 64)
    ),
    "get_layer_activations: a mapping": lambda m: (
        rl.get_layer_activations(
            m, {"target": ["Go away."], "baseline": ["Stay."]}, **QUICK
        ).target.shape
        == (1, 32, 64)
    ),
    "ablate_direction: an array": lambda m: len(rl.ablate_direction(m, R[3].numpy())) > 32,
    "ablate_direction: a Direction": lambda m: len(rl.ablate_direction(m, D.at(3))) > 32,
    "add_direction: a layer as text": lambda m: (
        rl.add_direction(m, R[3].tolist(), "3")[0][0] == "blocks.3.hook_resid_post"
    ),
    "add_direction: a numpy layer": lambda m: (
        rl.add_direction(m, R[3], np.int64(3))[0][0] == "blocks.3.hook_resid_post"
    ),
    "Protocol: a position": lambda m: rl.Protocol(positions=-2).positions == (-2,),
    "Protocol: a position as text": lambda m: rl.Protocol(positions="-2").positions == (-2,),
    "Protocol: a named position": lambda m: (
        rl.Protocol(positions="last_prompt_token").positions == ("last_prompt_token",)
    ),
    "Protocol: a list": lambda m: rl.Protocol(positions=[-2, "-1"]).positions == (-2, -1),
    "Config: the command's words": lambda m: (
        rl.Config(against="alarm", resamples=500, position=-2)
        == rl.Config(negativity="alarm", n_resamples=500, protocol=rl.Protocol(positions=(-2,)))
    ),
    "Config: a system prompt": lambda m: (
        rl.Config(system_prompt="Be kind.").protocol.system_prompt == "Be kind."
    ),
    "Config: a layer as text": lambda m: rl.Config(layer="20").layer == 20,
    "Config: one control": lambda m: (
        [*rl.Config(controls="arousal").contrasts()][2:] == ["arousal"]
    ),
    "Config: a list of controls": lambda m: len(rl.Config(controls=["alarm"]).contrasts()) == 3,
    "Config: a dtype": lambda m: rl.Config(dtype=torch.bfloat16).dtype == "bfloat16",
    "Config: a dtype as text": lambda m: rl.Config(dtype="torch.float32").dtype == "float32",
    "Config: a table": lambda m: (
        rl.Config(negativity=TABLE).contrasts()["negativity"].target_name == "rude"
    ),
    "Config.of: a mapping": lambda m: rl.Config.of({"model": NAME}, layer=3) == rl.Config(NAME, 3),
    "Config: one opening": lambda m: (
        rl.Config(refusal_openings="I won't").refusal_openings == ("I won't",)
    ),
    "Direction.at: a layer as text": lambda m: same(D.at("3"), R[3]),
    "Direction: a sum, a tenth, numpy's numbers": lambda m: same(
        ((D + R) / np.float32(10) - 2 * D).vectors, (R + R) / 10 - 2 * R
    ),
    "Direction.add: numpy's number": lambda m: len(D.at(3).add(np.float32(2), m)) == 1,
    "Contrast.subset: an array": lambda m: (
        len(rl.load_contrast("refusal").subset(np.arange(3), np.arange(3)).target) == 3
    ),
    "the version": lambda m: rl.__version__.count(".") == 2,
    "formats": lambda m: callable(rl.formats.read_directions),
    "Contrast: arrays and Series": lambda m: (
        rl.Contrast("c", TABLE["rude"], np.array(["x"])).target == ("Go away.", "Be quiet.")
    ),
    "show_tokens: one prompt": lambda m: len(rl.show_tokens(m.tokenizer, "Hello.")) > 1,
}


@pytest.fixture(scope="module")
def model():
    return rl.load_model(NAME)


@pytest.fixture(autouse=True)
def no_type_checker(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("case", WORKS)
def test_what_people_type_works(model, case):
    assert WORKS[case](model)


SLIPS = {
    "run_experiment: a typo": (
        lambda m: rl.run_experiment(NAME, max_prompt=3),
        "mean 'max_prompts'",
    ),
    "run_experiment: a list": (lambda m: rl.run_experiment([NAME]), "config is .*: hand over"),
    "run_experiment: the model first": (lambda m: rl.run_experiment(m), "config is .*: hand over"),
    "run_experiment: two positions": (
        lambda m: rl.run_experiment(NAME, positions=[-1, -2]),
        "takes one position",
    ),
    "run_experiment: too deep": (
        lambda m: rl.run_experiment(model=m, layer=32, **QUICK),
        "layer 32 is out of range",
    ),
    "plotting: text": (
        lambda m: rl.plotting.cosine_by_layer("cosine"),
        "is a str: hand over a tensor",
    ),
    "plotting: directions": (lambda m: rl.plotting.cosine_by_layer(R), "has shape"),
    "plotting: a typo": (lambda m: rl.plotting.cosine_by_layer(CURVE, layer=3), "named 'layer'"),
    "plotting: a theme": (lambda m: rl.plotting.cosine_by_layer(CURVE, theme="night"), "'dark'"),
    "plotting: below 0": (
        lambda m: rl.plotting.cosine_by_layer(CURVE, highlight=-1),
        "count from 0",
    ),
    "load_results: nowhere": (lambda m: rl.load_results("nowhere"), "nowhere"),
    "cosine_similarity: a layer and all": (lambda m: rl.cosine_similarity(R[20], N), "a has shape"),
    "ablate_direction: every layer's": (
        lambda m: rl.ablate_direction(m, R),
        r"such as directions\[layer\]",
    ),
    "ablate_direction: three axes": (
        lambda m: rl.ablate_direction(m, A),
        r"such as directions\[layer\]",
    ),
    "add_direction: every layer's": (lambda m: rl.add_direction(m, D, 3), r"directions\[layer\]"),
    "cosine_similarity: one direction": (
        lambda m: rl.cosine_similarity(R),
        "argument: 'b'; it takes a",
    ),
    "cosine_similarity: three": (lambda m: rl.cosine_similarity(R, N, R), "too many positional"),
    "cosine_similarity: a name": (lambda m: rl.cosine_similarity("refusal", R), "a is a str: hand"),
    "cosine_similarity: None": (lambda m: rl.cosine_similarity(None, R), "a is a NoneType: hand"),
    "cosine_similarity: two models": (
        lambda m: rl.cosine_similarity(R, N[:, :8]),
        "differ in d_model",
    ),
    "cosine_similarity: layer=": (
        lambda m: rl.cosine_similarity(R, N, layer=20),
        "named 'layer'; it",
    ),
    "cosine_similarity: words": (
        lambda m: rl.cosine_similarity(["a"], R),
        "a is a list: hand over a",
    ),
    "cosine_similarity: ragged": (lambda m: rl.cosine_similarity([[1], [1, 2]], R), "a is a list"),
    "cosine_similarity: prompts": (lambda m: rl.cosine_similarity(A, N), "a has shape"),
    "cosine_matrix: a number": (lambda m: rl.cosine_matrix(3, R), "a is a int: hand over a tensor"),
    "mean_difference: a contrast": (lambda m: rl.mean_difference("refusal", A), "target is a str"),
    "mean_difference: one set": (lambda m: rl.mean_difference(A), "argument: 'baseline'; it takes"),
    "mean_difference: two layers": (lambda m: rl.mean_difference(A, B[:, :2]), "differ in layer"),
    "mean_difference: swapped axes": (lambda m: rl.mean_difference(A[0], B), "target has shape"),
    "massive_dimensions: k": (
        lambda m: rl.massive_dimensions(A, k=1.5),
        "k is '1.5' \\(float\\): hand",
    ),
    "logistic_probe: penalty": (lambda m: rl.logistic_probe(A, B, penalty=1), "mean 'penalties'"),
    "whitened_cosine: a tensor": (lambda m: rl.whitened_cosine(R, N, R), "WithinClassCovariance"),
    "orthogonal_part: shapes": (lambda m: rl.orthogonal_part(R, N[0]), "shapes .* one shape"),
    "load_model: no name": (lambda m: rl.load_model(3), "name is '3' \\(int\\): hand over str"),
    "load_model: path=": (lambda m: rl.load_model(path="x"), "no argument is named 'path'"),
    "load_model: dtypes": (
        lambda m: rl.load_model(NAME, dtype="int8"),
        "dtype is int8: give a float",
    ),
    "load_model: torch_dtype": (lambda m: rl.load_model(NAME, torch_dtype=1), "mean 'dtype'"),
    "load_model: no organism": (
        lambda m: rl.load_model("organism:specifc"),
        "no organism 'specifc'",
    ),
    "load_model: a device": (
        lambda m: rl.load_model(NAME, device="gpu"),
        "'gpu' is no device: try",
    ),
    "load_model: devices": (lambda m: rl.load_model(NAME, n_devices="two"), "n_devices is 'two'"),
    "from_hugging_face: a name": (
        lambda m: rl.from_hugging_face(NAME, None),
        "str is no language mod",
    ),
    "load_contrast: a typo": (lambda m: rl.load_contrast("refusals"), "did you mean 'refusal'"),
    "load_contrast: a number": (
        lambda m: rl.load_contrast(3),
        "name is '3' \\(int\\): hand over str",
    ),
    "load_contrast: nothing": (lambda m: rl.load_contrast(), "missing .*'name'; it takes name"),
    "Contrast: no baseline": (
        lambda m: rl.Contrast("c", ["a"]),
        "missing .*'baseline'; it takes name",
    ),
    "Contrast: harmful=": (
        lambda m: rl.Contrast("c", harmful=["a"]),
        "named 'harmful'; it takes name",
    ),
    "Contrast: one string": (lambda m: rl.Contrast("c", "a", "b"), '`target` is "a": give a list'),
    "Contrast: numbers": (
        lambda m: rl.Contrast("c", [1], ["b"]),
        "target\\[0\\] is 1, int, not a str",
    ),
    "Contrast: no pairs": (
        lambda m: rl.Contrast("c", ["a", "b"], ["c"], paired=True),
        "no partner",
    ),
    "contrast_from_file: no column": (
        lambda m: rl.contrast_from_file("a.csv"),
        "missing .*'target'",
    ),
    "contrast_from_file: no file": (
        lambda m: rl.contrast_from_file("none.csv", target="a", baseline="b"),
        "none.csv can't be read",
    ),
    "contrast_from_dataset: a list": (
        lambda m: rl.contrast_from_dataset([1], target="a", baseline="b"),
        "is no Hugging Face dataset",
    ),
    "load_prompts: a list": (
        lambda m: rl.load_prompts(["a"]),
        "source is .* \\(list\\): hand over",
    ),
    "get_layer_activations: prompts": (
        lambda m: rl.get_layer_activations(m, ["How do I bake?"], **QUICK),
        "no bundled contrast",
    ),
    "get_layer_activations: a wide table": (
        lambda m: rl.get_layer_activations(m, TABLE.assign(topic="x"), **QUICK),
        r"two columns, not .* give table\[\[",
    ),
    "get_layer_activations: swapped": (
        lambda m: rl.get_layer_activations(rl.load_contrast("refusal"), m),
        "Contrast has no hooks: use",
    ),
    "get_layer_activations: a number": (
        lambda m: rl.get_layer_activations(m, 3),
        "3 is no contrast",
    ),
    "get_layer_activations: no contrast": (
        lambda m: rl.get_layer_activations(m),
        "argument: 'contr",
    ),
    "get_layer_activations: a layer": (
        lambda m: rl.get_layer_activations(m, "refusal", layer=20),
        "no argument is named 'layer'; it takes model, contrast, protocol",
    ),
    "get_layer_activations: batch": (
        lambda m: rl.get_layer_activations(m, "refusal", batch=8),
        "did you mean 'batch_size'",
    ),
    "get_layer_activations: a protocol": (
        lambda m: rl.get_layer_activations(m, "refusal", protocol="arditi"),
        "protocol is 'arditi' \\(str\\): hand over Protocol",
    ),
    "get_layer_activations: no model": (
        lambda m: rl.get_layer_activations(None, "refusal"),
        "NoneType has no hooks: use",
    ),
    "get_layer_activations: a missing folder": (
        lambda m: rl.get_layer_activations("./nowhere", "refusal"),
        "no directory ./nowhere",
    ),
    "get_prompt_activations: one prompt": (
        lambda m: rl.get_prompt_activations(m, "Hello.", **QUICK),
        "single string: give a list",
    ),
    "get_prompt_activations: a contrast": (
        lambda m: rl.get_prompt_activations(m, rl.load_contrast("refusal"), **QUICK),
        "prompts is .* \\(Contrast\\): hand over Sequence\\[str\\]",
    ),
    "get_prompt_activations: numbers": (
        lambda m: rl.get_prompt_activations(m, [1, 2], **QUICK),
        "prompts\\[0\\] is 1, int, not a string",
    ),
    "get_prompt_activations: none": (
        lambda m: rl.get_prompt_activations(m, [], **QUICK),
        "no prompts",
    ),
    "extract: one contrast": (lambda m: rl.extract(m, 3), "3 is no contrast: give"),
    "extract: one name": (
        lambda m: rl.extract(m, "refusal", **QUICK),
        "contrasts is .* \\(Contrast\\): hand over Sequence\\[Contrast\\]",
    ),
    "build_inputs: the model": (
        lambda m: rl.build_inputs_with_chat_template(m, ["a"]),
        "is not a fast tokenizer",
    ),
    "show_tokens: a name": (lambda m: rl.show_tokens(NAME, ["a"]), "str is not a fast tokenizer"),
    "ablate_direction: swapped": (
        lambda m: rl.ablate_direction(R[0], m),
        "Tensor has no hooks: use",
    ),
    "ablate_direction: text": (lambda m: rl.ablate_direction(m, "refusal"), "direction is a str"),
    "ablate_direction: another model": (
        lambda m: rl.ablate_direction(m, R[0, :8]),
        "not fit this mod",
    ),
    "ablate_direction: zeros": (lambda m: rl.ablate_direction(m, [0] * 64), "is zero"),
    "ablate_direction: NaN": (lambda m: rl.ablate_direction(m, R[0] * np.nan), "NaN or infinite"),
    "ablate_direction: layer=": (lambda m: rl.ablate_direction(m, R[0], layer=20), "named 'layer'"),
    "add_direction: no layer": (
        lambda m: rl.add_direction(m, R[0]),
        "missing .*'layer'; it takes mod",
    ),
    "dose_response: too deep": (
        lambda m: rl.dose_response(m, "refusal", "negativity", layer=99),
        "no layer 99: choose 0 to 31",
    ),
    "dose_response: no layer": (
        lambda m: rl.dose_response(m, "refusal", "negativity"),
        "missing .*'layer'; it takes mod",
    ),
    "add_direction: too deep": (lambda m: rl.add_direction(m, R[0], 32), "no layer 32: choose -1"),
    "add_direction: half": (
        lambda m: rl.add_direction(m, R[0], 1.5),
        "layer is '1.5' \\(float\\): hand",
    ),
    "add_direction: words": (
        lambda m: rl.add_direction(m, R[0], "last"),
        "layer is 'last' \\(str\\)",
    ),
    "add_direction: coefficient": (
        lambda m: rl.add_direction(m, R[0], 3, coefficient=2),
        "no argument is named 'coefficient'; it takes model, direction, layer",
    ),
    "find_refusal_tokens: one prompt": (
        lambda m: rl.find_refusal_tokens(m, ["a"], ["b"]),
        "at least tw",
    ),
    "refusal_log_odds: no token": (lambda m: rl.refusal_log_odds(R[0], [99]), "99 is no token of"),
    "Protocol: a typo": (lambda m: rl.Protocol(system="x"), "did you mean 'system_prompt'"),
    "Protocol: from the start": (lambda m: rl.Protocol(positions=5), "count from the end"),
    "Protocol: a word": (lambda m: rl.Protocol(positions="last"), "positions has 'last'"),
    "Protocol: no position": (lambda m: rl.Protocol(positions=None), "positions has None"),
    "Protocol: a fraction": (lambda m: rl.Protocol(positions=-1.5), "positions has -1.5"),
    "Protocol: a hook": (lambda m: rl.Protocol(hook="resid_mid"), "choose resid_post or resid_pre"),
    "Protocol: text for yes": (
        lambda m: rl.Protocol(thinking="no"),
        "thinking is .no. \\(str\\): hand over bool",
    ),
    "Config: a typo": (lambda m: rl.Config(modle=NAME), "did you mean 'model'"),
    "Config: a model": (
        lambda m: rl.Config(model=m),
        "give its name, or run_experiment\\(model=model\\)",
    ),
    "Config: a layer": (
        lambda m: rl.Config(layer="last"),
        "layer is 'last' \\(str\\): hand over int",
    ),
    "Config: half a layer": (
        lambda m: rl.Config(layer=2.5),
        "layer is '2.5' \\(float\\): hand over int",
    ),
    "Config: no contrast": (lambda m: rl.Config(refusal=3).contrasts(), "3 is no contrast"),
    "Config: a contrast's typo": (
        lambda m: rl.Config(against="alarms").contrasts(),
        "mean 'alarm'",
    ),
    "Config: too few resamples": (lambda m: rl.Config(n_resamples=3), "intervals need at least"),
    "Config: no prompts": (lambda m: rl.Config(max_prompts=0), "max_prompts is 0: at least one"),
    "Config: one contrast twice": (
        lambda m: rl.Config(controls=("alarm", "alarm")).contrasts(),
        "share the prompt",
    ),
    "analyse: nothing": (lambda m: rl.analyse(), "missing .*'activations'; it takes"),
    "analyse: one contrast": (lambda m: rl.analyse({"refusal": (A, B)}), "lack 'negativity'"),
    "analyse: directions": (
        lambda m: rl.analyse({"refusal": R, "negativity": N}),
        "lack 'refusal'",
    ),
    "analyse: a list": (lambda m: rl.analyse([A, B]), "hand over Mapping"),
    "write_report: a folder": (
        lambda m: rl.write_report("runs/x", "y"),
        "results is .*: hand over Res",
    ),
    "Results.load: nowhere": (lambda m: rl.Results.load("nowhere"), "nowhere"),
    "config_of: nowhere": (lambda m: rl.config_of("nowhere"), "nowhere"),
    "judge: results": (lambda m: rl.judge("x"), "is 'x' \\(str\\): hand over Evidence"),
    "select_direction: a list": (lambda m: rl.select_direction(m, ["a"]), "no bundled contrast"),
    "run_sensitivity: one contrast": (
        lambda m: rl.run_sensitivity(m, "refusal"),
        "hand over tuple",
    ),
    "Direction: text": (lambda m: rl.Direction("refusal"), "vectors is a str: hand over a tensor"),
    "Direction: prompts": (lambda m: rl.Direction(A), "vectors has shape"),
    "Direction: layer=": (lambda m: rl.Direction(R, layer=3), "did you mean 'layers'"),
    "Direction: other layers": (
        lambda m: rl.Direction(R, layers=[1, 2]),
        "give each vector its layer",
    ),
    "Direction.at: too deep": (lambda m: D.at(32), "no layer 32: it has layers 0 to 31"),
    "Direction.at: a word": (lambda m: D.at("last"), "layer is 'last' .*hand over int"),
    "Direction.ablate: all layers": (
        lambda m: D.ablate(m),
        "layers 0 to 31: choose one, as in .at",
    ),
    "Direction.ablate: no model": (lambda m: D.at(3).ablate(), "hand it over as model="),
    "Direction.add: no layer": (
        lambda m: rl.Direction(R[0]).add(1, m),
        "Direction\\(..., layers=20\\)",
    ),
    "Direction.project: no model": (lambda m: D.project("Hello."), "hand it over as model="),
    "Direction.project: one vector": (lambda m: D.project(R[0]), "hand over those of its layers"),
    "Direction + a layer": (lambda m: D + N[0], "take one layer, r.at\\(20\\)"),
    "Direction: two layers": (lambda m: D.at(2) - D.at(3), "of layer 2 and .* take one layer"),
    "Direction.load: nowhere": (lambda m: rl.Direction.load("nowhere.pt"), "no file nowhere.pt"),
    "compare_replies: nothing": (
        lambda m: rl.compare_replies(m, "Hello."),
        "give ablate=DIRECTION",
    ),
    "compare_replies: all layers": (
        lambda m: rl.compare_replies(m, "Hello.", ablate=D),
        "layers 0 to 31: choose one",
    ),
    "compare_replies: no layer": (
        lambda m: rl.compare_replies(m, "Hello.", add=R[3]),
        "'direction' knows no layer",
    ),
    "compare_replies: a name": (
        lambda m: rl.compare_replies(m, "Hello.", ablate="refusal"),
        "vectors is a str",
    ),
    "load_results: a number": (lambda m: rl.load_results(3), r"folder is '3' \(int\): hand over"),
    "load_results: nothing": (lambda m: rl.load_results(), "missing .*'folder'"),
    "Results.load: None": (lambda m: rl.Results.load(None), "folder is 'None'"),
    "Results.save: a number": (lambda m: results().save(3), "folder is '3'"),
    "Results.figure: a theme": (lambda m: results().figure(theme="night"), "'dark'"),
    "Results.to_pandas: a layer": (lambda m: results().to_pandas("layer"), "choose 'layers'"),
    "Results.why_unknown: too deep": (lambda m: results().why_unknown(40), "layers 0 to 31"),
    "Results.why_unknown: a part": (
        lambda m: results().why_unknown(3, "alarm"),
        "no cosine with 'alarm' at layer 3: choose negativity",
    ),
    "write_report: a null byte": (lambda m: rl.write_report(results(), "a\0.html"), "null byte"),
    "write_report: a number": (lambda m: rl.write_report(results(), 3), "path is '3'"),
    "panel: a folder": (lambda m: rl.panel("runs/x", m), "results is 'runs/x' .*: hand over Res"),
    "panel: swapped": (lambda m: rl.panel(m, results()), "hand over Results"),
    "Direction.save: a null byte": (lambda m: D.save("a\0.npy"), "null byte"),
    "Direction.save: a number": (lambda m: D.save(3), "path is '3'"),
    "Direction.save: an ending": (lambda m: D.save("a.txt"), "files are written as .safetensors"),
    "Direction.load: a null byte": (lambda m: rl.Direction.load("a\0.npy"), "no file"),
    "Direction.load: a number": (lambda m: rl.Direction.load(3), "path is '3'"),
    "read_directions: a number": (lambda m: rl.formats.read_directions(3), "path is '3'"),
    "Direction + text": (lambda m: D + "a", "other is 'a': take a Direction, a tensor or a num"),
    "text + Direction": (lambda m: "a" + D, "other is 'a'"),
    "Direction * None": (lambda m: D * None, "other is None"),
    "Direction / text": (lambda m: D / "2", "other is '2'"),
    "Direction - words": (lambda m: D - ["a"], r"other is \['a'\]"),
    "Direction + a mapping": (lambda m: D + {"a": 1}, "other is {'a': 1}"),
    "Direction: a protocol": (lambda m: rl.Direction(R, protocol="x"), "protocol is 'x'"),
    "Direction.at: nothing": (lambda m: D.at(), "Direction.at: missing .*'layer'; it takes layer"),
    "Direction.at: a list": (lambda m: D.at([1, 2]), r"layer is '\[1, 2\]' \(list\)"),
    "Direction.top_tokens: k": (lambda m: D.at(3).top_tokens("a", m), "k is 'a' .*hand over int"),
    "Direction.add: the model": (lambda m: D.at(3).add(m), "coefficient is .*hand over float"),
    "Direction.of: swapped": (
        lambda m: rl.Direction.of("refusal", m),
        "no bundled contrast|refusal",
    ),
    "Direction.of: an estimator": (
        lambda m: rl.Direction.of(m, "refusal", estimator="mean"),
        "estimator is 'mean' .*hand over Callable",
    ),
    "Direction.project: a contrast": (
        lambda m: D.project(rl.load_contrast("refusal")),
        "activations is a Contrast",
    ),
    "Contrast.subset: text": (
        lambda m: rl.load_contrast("refusal").subset("ab", "ab"),
        r"rows are \['a', 'b'\]: give numbers from 0 to 107",
    ),
    "Contrast.subset: too far": (
        lambda m: rl.load_contrast("refusal").subset([999], [999]),
        r"rows are \[999\]",
    ),
    "Contrast.subset: a number": (
        lambda m: rl.load_contrast("refusal").subset(3, 3),
        "target_rows is '3' .*hand over Iterable",
    ),
    "Contrast.subset: one side": (
        lambda m: rl.load_contrast("refusal").subset([1]),
        "missing .*'baseline_rows'; it takes target_rows",
    ),
    "Config: percent": (lambda m: rl.Config(confidence=95), "confidence"),
    "Config: confidence as text": (lambda m: rl.Config(confidence="0.95"), "hand over float"),
    "Config: thresholds": (lambda m: rl.Config(thresholds={"margin": 0.1}), "hand over Thresholds"),
    "Config: a named protocol": (lambda m: rl.Config(protocol="arditi"), "hand over Protocol"),
    "Config: text for no": (lambda m: rl.Config(interventions="no"), "hand over bool"),
    "Cache: a number": (lambda m: rl.Cache(None).load("a"), "key is 'a' .*hand over Mapping"),
    "covariance: text": (
        lambda m: rl.WithinClassCovariance.of(A, B).solve("x"),
        "vectors is a str: hand over a tensor",
    ),
    "judge: a threshold": (
        lambda m: rl.judge(results().verdict.evidence, 0.2),
        "thresholds is '0.2' .*hand over Thresholds",
    ),
    "config_of: a number": (lambda m: rl.config_of(3), "path is '3'"),
    "run_sensitivity: a typo": (
        lambda m: rl.run_sensitivity(m, ("refusal", "negativty"), **QUICK),
        "did you mean 'negativity'",
    ),
    "run_sensitivity: a layer": (
        lambda m: rl.run_sensitivity(m, ("refusal", "negativity"), layer="a", **QUICK),
        "layer is 'a' .*hand over int",
    ),
    "compare_replies: two coefficients": (
        lambda m: rl.compare_replies(m, "Hello.", add=D.at(3), coefficients=[1, 2]),
        "did you mean 'coefficient'",
    ),
}


@pytest.mark.parametrize("case", SLIPS)
def test_a_slip_is_answered_in_one_line_that_says_what_to_write(model, case):
    call, message = SLIPS[case]
    with pytest.raises(rl.InputError, match=message) as error:
        call(model)
    assert len(str(error.value).splitlines()) == 1


def test_at_least_a_hundred_slips_are_tried():
    assert len(SLIPS) + len(WORKS) > 190
    assert len(SLIPS) >= 140


def test_a_public_function_is_the_modules_own_with_its_name_and_signature():
    import inspect

    from refusal_lens.directions.similarity import cosine_similarity

    assert rl.cosine_similarity.__wrapped__ is cosine_similarity
    assert rl.cosine_similarity is rl.cosine_similarity
    assert inspect.signature(rl.cosine_similarity) == inspect.signature(cosine_similarity)
