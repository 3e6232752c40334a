"""`refusal-lens run` on a user's own prompts: from the words on the command line to the contrast."""

import pytest

import refusal_lens as rl
from refusal_lens.cli.main import main


@pytest.fixture
def config_of(monkeypatch, tmp_path):
    """The configuration that `run` with these options would run."""

    class Stop(Exception):  # noqa: N818
        pass

    def call(*options: str) -> rl.Config:
        kept = []

        def keep(config, **_):
            kept.append(config)
            raise Stop

        monkeypatch.setattr(rl, "run_experiment", keep)
        with pytest.raises(Stop):
            main(["run", "--model", "organism:specific", "--out", str(tmp_path / "out"), *options])
        return kept[0]

    return call


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text;kind\na;bad\nx;good\n a;bad\nb;bad\nb;good\n")
    return path


@pytest.mark.parametrize(
    ("options", "target"), [((), ("a",)), (("--keep-duplicates",), ("a", "a"))]
)
def test_repeats_are_counted_once_unless_asked_otherwise(config_of, file, capsys, options, target):
    sides = ("--target", f"{file}:text:kind=bad", "--baseline", f"{file}:text:kind=good")
    contrast = config_of(*sides, *options).contrasts()["refusal"]
    assert (contrast.target, contrast.baseline) == (target, ("x",))
    assert contrast.target_name == "bad"
    assert "prompts: 1 stand on both sides" in capsys.readouterr().err


def test_few_of_a_contrast_s_prompts_keep_their_clusters(tmp_path, config_of):
    path = tmp_path / "mine.csv"
    path.write_text("cluster,bad,good\nq,a,x\nr,b,y\ns,c,z\n")
    sides = ("--target", f"{path}:bad", "--baseline", f"{path}:good", "--max-prompts", "2")
    contrast = config_of(*sides).contrasts()["refusal"]
    assert contrast.target == ("a", "c")
    assert contrast.clusters == (("q", "s"), ("q", "s"))
    bundled = config_of("--max-prompts", "3").contrasts()["refusal"]
    assert len(bundled.clusters) == 3
    assert set(bundled.clusters) < set(rl.load_contrast("refusal").clusters)


def test_a_new_concept_on_the_map_is_one_file(tmp_path, monkeypatch, capsys):
    asked = []

    class Found:
        layer = 3

        def beside(self, *others, likeness):
            return rl.plotting.intervals_by_name({"a": {likeness: (0.0, 0.0, float(len(others)))}})

        def save(self, folder):
            asked.append(folder)

        def __str__(self):
            return "a table"

    def compare(model, concepts, **options):
        asked.append((model, concepts, options["max_prompts"]))
        return Found()

    monkeypatch.setattr(rl, "compare_concepts", compare)
    path = tmp_path / "mine.csv"
    path.write_text("with,without\na,x\nb,y\n")
    out = ("--out", str(tmp_path / "out"), "--max-prompts", "5")
    concepts = f"negativity,{path}:with:without"
    main(["atlas", "--model", "organism:specific", "--concepts", concepts, *out])
    (model, (named, own), most), folder = asked
    assert (model, named, most, folder) == ("organism:specific", "negativity", 5, tmp_path / "out")
    assert (own.name, own.target, own.baseline) == ("mine", ("a", "b"), ("x", "y"))
    assert "a table" in capsys.readouterr().out
    main(["atlas", "--model", "organism:specific", "--model", "models/a,b.gguf", *out])
    assert asked[-1] == tmp_path / "out" / "models-a-b.gguf"
    assert asked[-2][0] == "models/a,b.gguf"
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")}
    assert figures == {"models-cosine", "models-cross_ablation", "models-cross_addition"}


def test_a_file_without_its_two_columns_is_refused_with_what_to_write(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["atlas", "--concepts", "mine.csv:with", "--out", str(tmp_path / "out")])
    assert "mine.csv:with: write FILE:COLUMN:COLUMN" in capsys.readouterr().err
