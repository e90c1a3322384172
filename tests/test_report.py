"""The report: from records to a document, through its command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import dropwhile, takewhile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from allostasis import report
from allostasis.analysis import canvas, document, studies
from allostasis.analysis.aggregate import Arm, arms, one_a_condition
from allostasis.analysis.claims import Claim
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.verdicts import judge
from allostasis.core.records import read_runs
from allostasis.experiments.grokking import report as grokking

Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def shown(study: Path) -> list[Arm]:
    return one_a_condition(arms([RunView(record) for record in read_runs(study)]))


@pytest.fixture(scope="module")
def written(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the study, on a copy."""
    root = tmp_path_factory.mktemp("written") / "outputs"
    shutil.copytree(study, root)
    assert report.main([str(root / "grokking")]) == 0
    return root / "grokking/report"


def markdown_table(text: str, heading: str) -> list[dict[str, str]]:
    """The first table below a heading, a row a mapping."""
    below = re.split(rf"^#+ {re.escape(heading)}\n", text, maxsplit=1, flags=re.MULTILINE)[1]
    lines = dropwhile(lambda line: not line.startswith("|"), below.splitlines())
    rows = takewhile(lambda line: line.startswith("|"), lines)
    heads, _, *body = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return [dict(zip(heads, row, strict=True)) for row in body]


def test_a_report_remembers_at_how_many_units_it_judged(written: Path) -> None:
    looks = document.earlier_looks([written.parent, written])["grokking"]
    assert looks["C1.groks"] == [8]
    assert "C4.muon" not in looks  # a compound, whose arm was not run


# ---------------------------------------------------------------- figures


def test_every_figure_draws_from_a_fixture_record(shown: list[Arm]) -> None:
    figures = grokking.figures(shown)
    assert {figure.name for figure in figures} >= {
        "figure_3_phase_diagram", "losses", "fourier_power", "survival", "t_grok", "head_norms",
        "identity",
    }  # fmt: skip
    for figure in figures:
        assert canvas.png(figure).startswith(b"\x89PNG")


def test_every_figure_draws_from_one_run_of_one_arm(tmp_path: Path, write_run: Writer) -> None:
    write_run(tmp_path, "no_wd")
    alone = one_a_condition(arms([RunView(record) for record in read_runs(tmp_path)]))
    for figure in grokking.figures(alone):
        assert canvas.png(figure).startswith(b"\x89PNG")


def test_a_figure_without_its_records_says_what_is_missing(
    tmp_path: Path, write_run: Writer
) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = write_run(tmp_path) / "metrics.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(pc.not_equal(table["metric"], "fourier_power")), path)
    alone = one_a_condition(arms([RunView(record) for record in read_runs(tmp_path)]))
    (figure,) = [f for f in grokking.figures(alone) if f.name == "fourier_power"]
    with pytest.raises(UndefinedError, match="fourier_power was not recorded"):
        canvas.png(figure)


@pytest.mark.parametrize("count", [1, 2])
def test_legends_lie_inside_the_figure_and_over_no_data(shown: list[Arm], count: int) -> None:
    for figure in grokking.figures(shown[:count]):
        with canvas.style() as plt:
            drawn = figure.draw()
            drawn.canvas.draw()
            for legend in drawn.legends:
                box = legend.get_window_extent()
                assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1, figure.name
                assert not any(box.overlaps(axis.get_window_extent()) for axis in drawn.axes)
            assert all(axis.get_legend() is None for axis in drawn.axes)
            plt.close(drawn)


def test_axes_say_what_they_show_in_plain_words_with_the_unit(shown: list[Arm]) -> None:
    quantities = [*grokking.AMPLITUDES, *grokking.LOSSES, *grokking.NORMS, grokking.POWER]
    for quantity in quantities:
        assert re.search(r"[a-z]{3}.*, \S+$", quantity.label), quantity.label
    with canvas.style() as plt:
        for figure in grokking.figures(shown):
            drawn = figure.draw()
            for axis in drawn.axes:
                if axis.get_subplotspec() is not None and axis.get_subplotspec().is_last_row():
                    assert axis.get_xlabel()
            plt.close(drawn)


def test_layers_lie_in_0_to_n_minus_1_and_position_0_is_a_separate_row(shown: list[Arm]) -> None:
    run = shown[0].runs[0]
    layers = run.table("amplitude_param")["layer"]
    assert set(layers) == {0}  # one layer: index 0, and no index 1
    with canvas.style() as plt:
        drawn = next(f for f in grokking.figures(shown) if f.name == "head_norms").draw()
        labels = [text.get_text() for text in drawn.legends[0].get_texts()]
        plt.close(drawn)
    assert [label for label in labels if label.startswith("head")] == [
        f"head 0.{head}" for head in range(4)
    ]
    # no reader averages positions: one must be named
    with pytest.raises(ValueError, match="select one by position"):
        run.curve("fourier_power")


# ---------------------------------------------------------------- numbers


def test_the_exploratory_table_can_be_recomputed_from_the_records(
    study: Path, written: Path
) -> None:
    rows = markdown_table((written / "REPORT.md").read_text(), "Exploratory: final values")
    found = {(row["metric"], row["split"]): row for row in rows}
    values = []
    for seed in range(8):
        path = study / f"grokking/high_wd/seed={seed}/auto-abc/metrics.parquet"
        table = pd.read_parquet(path).query("metric == 'logit_scale' and split == 'test'")
        late = table[table["step"] >= 19_000].sort_values("step")
        values.append(np.trapezoid(late["value"], late["step"]) / 1_000)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    cell = found["logit_scale", "test"]["high_wd: mean, 95 %, n"]
    assert cell == f"{np.mean(values):.4g} [{low:.4g}, {high:.4g}] n=8"


def test_the_table_of_events_can_be_recomputed_from_the_records(study: Path, written: Path) -> None:
    rows = markdown_table((written / "REPORT.md").read_text(), "When each phase began")
    assert len(rows) == 16
    for row in rows:
        folder = study / f"grokking/{row['condition']}/seed={row['seed']}/auto-abc"
        run = json.loads((folder / "run.json").read_text())
        assert row["run"] == run["run_id"]
        for event in ("t_mem", "t_clean", "t_grok", "t_loss"):
            step = run["summary"][event]
            assert row[event] == ("> 20000" if step is None else str(step))


def test_verdicts_in_the_document_the_json_and_the_records_agree(
    study: Path, written: Path
) -> None:
    verdicts = json.loads((written / "verdicts.json").read_text())["grokking"]
    rows = markdown_table((written / "REPORT.md").read_text(), "grokking")
    assert [row["claim"] for row in rows] == [verdict["id"] for verdict in verdicts]
    for row, verdict in zip(rows, verdicts, strict=True):
        assert row["verdict"] == f"**{verdict['verdict']}**"
    times = {}
    for verdict in verdicts:
        for unit in verdict.get("units", []):
            assert unit["run_id"].split("-")[2] == str(unit["seed"])
        if verdict["id"] == "C1.time":
            times = {unit["run_id"]: unit["value"] for unit in verdict["units"]}
    for seed in range(8):
        run = json.loads((study / f"grokking/high_wd/seed={seed}/auto-abc/run.json").read_text())
        assert times[run["run_id"]] == run["summary"]["t_grok"]


def test_counts_cover_every_claim(written: Path) -> None:
    verdicts = json.loads((written / "verdicts.json").read_text())["grokking"]
    text = (written / "REPORT.md").read_text()
    (line,) = re.findall(r"^.* undecided of .*$", text, flags=re.MULTILINE)
    *counts, whole = map(int, re.findall(r"\d+", line))
    assert sum(counts) == whole == len(verdicts)
    (row,) = markdown_table(text, "Claims")
    assert [
        int(row[word]) for word in ("supported", "refuted", "equivalent", "undecided")
    ] == counts
    assert row["claims"] == str(whole)


# ---------------------------------------------------------------- the document


@pytest.mark.slow
def test_a_report_made_again_is_the_same_to_the_byte(written: Path) -> None:
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    assert report.main([str(written.parent)]) == 0
    assert {path: path.read_bytes() for path in written.rglob("*") if path.is_file()} == before


class Page(HTMLParser):
    """Tags that were opened and not closed, tags seen, and addresses of images."""

    VOID = ("meta", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_html_needs_no_other_file_and_runs_nothing(written: Path) -> None:
    page = Page()
    page.feed((written / "report.html").read_text())
    assert page.open == []
    assert "script" not in page.seen
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert sum(source.startswith("data:") for source in page.sources) == 8


def test_what_a_run_wrote_is_escaped(written: Path) -> None:
    html = (written / "report.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | &amp; boom" in html
    assert "&lt;script>alert(1)&lt;/script> \\| & boom" in (written / "REPORT.md").read_text()


def test_verdicts_are_set_alike_whatever_they_say(written: Path) -> None:
    html = (written / "report.html").read_text()
    words = re.findall(r'<(?:td|span) class="(\w+)">(supported|refuted|undecided)</', html)
    assert {word for _, word in words} == {"supported", "refuted", "undecided"}
    assert {style for style, _ in words} == {"verdict"}
    assert html.count(".verdict {") == 1


def test_the_document_proves_nothing_and_carries_every_part(written: Path) -> None:
    text = (written / "REPORT.md").read_text()
    assert not re.search(r"\bprove[sn]?\b", text, flags=re.IGNORECASE)
    for part in (
        "**claimed**", "**measured**", "**units**", "**test**", "**confounds**", "**effect size**",
        "**claim sha256**", "**beside it**", "not excluded", "Exploratory", "Provenance",
        "C1.groks", "seed 8 failed", "not checked: these runs record no commit",
    ):  # fmt: skip
        assert part in text, part


def test_a_study_has_its_question_controls_power_and_commands(written: Path) -> None:
    text = (written / "REPORT.md").read_text()
    assert "Does weight decay move a modular-addition transformer from amplitude" in text
    assert "What would refute it: amplitude that does not fall" in text
    controls = markdown_table(text, "Controls and nulls")
    decay = next(
        row for row in controls if row["what else could give the result"].startswith("adam")
    )
    assert decay["control arm"] == "none: not excluded"
    power = {row["claim"]: row for row in markdown_table(text, "Power of what is undecided")}
    assert power["C4.muon"]["there are"] == "0 seeds"
    assert power["C4.muon"]["least that could support it"] == "25"
    assert "- Fewer than the 25 seeds that could support it, with how many there are: " in text
    assert (
        "    make install && . .venv/bin/activate\n    python -m allostasis +exp=grokking" in text
    )


def test_instrument_gates_are_told_with_how_far_they_were_off(
    tmp_path: Path, write_run: Writer
) -> None:
    gate = {"name": "I1", "tolerance": 1e-9}
    for seed, worst in enumerate((1e-12, 1e-3)):
        gates = {"I1 identity": gate | {"worst": worst, "passed": worst < 1e-9}}
        status = "done" if worst < 1e-9 else "failed_verification"
        write_run(tmp_path, "high_wd", seed, every=1000, gates=gates, status=status)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report/REPORT.md").read_text()
    (row,) = markdown_table(text, "Instrument gates")
    assert row == {"gate": "I1 identity", "passed": "1 of 2 runs", "worst": "0.001",
                   "allowed": "1e-09"}  # fmt: skip
    assert "instrument gates failed: I1 identity" in text


def test_every_picture_of_the_markdown_is_there(written: Path) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (written / "REPORT.md").read_text())
    assert len(pictures) == 8
    assert all((written / picture).is_file() for picture in pictures)


def test_a_recorded_studys_report_is_called_by_the_study_and_its_variant(
    tmp_path: Path, write_run: Writer
) -> None:
    study = tmp_path / "2026-01-01_decay"
    study.mkdir()
    (study / "design.yaml").touch()
    folders = {study / "wide/runs": "2026-01-01_decay/wide", tmp_path / "outputs": "outputs"}
    for folder, title in folders.items():
        write_run(folder, "high_wd", 0, every=1000)
        assert report.main([str(folder)]) == 0
        assert (folder / "report/REPORT.md").read_text().startswith(f"# Report on {title}\n")


def test_an_unfinished_study_is_reported_as_such(tmp_path: Path, write_run: Writer) -> None:
    write_run(tmp_path, status="running", summary=None)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report/REPORT.md").read_text()
    assert "seed 0 running" in text
    assert "0 supported, 0 refuted, 0 equivalent" in text
    assert "Not drawn: no claim has an estimate yet." in text


def test_claims_are_looked_up_in_the_commit_that_the_runs_name(
    tmp_path: Path, write_run: Writer
) -> None:
    from allostasis.analysis import claim_files
    from allostasis.analysis.provenance import frozen_in_commit

    repository = tmp_path / "code"
    repository.mkdir()
    source = Path(grokking.__file__).with_name("claims.yaml").read_text()

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", "-C", str(repository), *who, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (repository / "claims.yaml").write_text(source)
    git("add", ".")
    git("commit", "-qm", "claims")
    head = git("rev-parse", "HEAD")
    write_run(tmp_path / "outputs", commit=head)
    (run,) = [RunView(record) for record in read_runs(tmp_path / "outputs")]
    count = len(claim_files.load(repository, "grokking"))
    said = frozen_in_commit([run], repository)
    assert said == f"{head[:12]}: all {count} claims stand in it as frozen"
    run.run["claims"] = run.run["claims"] | {"C1.groks": "0" * 64}
    assert frozen_in_commit([run], repository) == f"{head[:12]}: not in it as frozen: C1.groks"
    run.run["commit"] = "f" * 40
    assert "not checked: this repository has no such file" in frozen_in_commit([run], repository)
    shutil.rmtree(repository / ".git")
    assert frozen_in_commit([run], repository) == "not checked: no git repository"


# ---------------------------------------------------------------- the command line


@pytest.mark.slow
def test_reporting_never_imports_torch(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "grokking/high_wd/seed=0", tmp_path / "outputs/seed=0")
    code = (
        "import sys; from allostasis import report; "
        f"assert report.main([{str(tmp_path / 'outputs')!r}]) == 0; "
        "heavy = {'torch', 'lightning', 'transformer_lens', 'sae_lens'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_is_quick_and_shows_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "allostasis.report", "--help"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "python -m allostasis.report outputs/grokking" in done.stdout
    assert "pandas" not in done.stderr
    assert "matplotlib" not in done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ((), "is not a folder. {parent} holds: nothing."),
        (
            ("wrong/notes.txt",),
            "holds no run: no run.json lies in or below it. It holds: notes.txt",
        ),
    ],
)
def test_a_folder_without_runs_is_refused_with_what_is_there(
    make: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("x")
    assert report.main([str(tmp_path / "wrong")]) == 2
    assert message.format(parent=tmp_path) in capsys.readouterr().err


def test_two_conditions_that_are_one_stop_the_report(
    tmp_path: Path, write_run: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "high_wd")
    write_run(tmp_path, "no_wd", config={"module.weight_decay": 1.0})
    assert report.main([str(tmp_path)]) == 2
    assert "'high_wd' and 'no_wd' of grokking have equal settings" in capsys.readouterr().err


@pytest.mark.slow
def test_the_summary_on_screen_names_every_claim_and_file(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(written.parent)]) == 0
    screen = capsys.readouterr().out
    assert "C.conserve" in screen
    assert "refuted" in screen
    assert str(written / "report.html") in screen


def test_audit_logs_are_exported_under_the_documents_names(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = study / "grokking/high_wd/seed=3"
    assert report.main([str(run), "--export", "audit", "--to", str(tmp_path / "data")]) == 0
    exported = tmp_path / "data/audit_log_exp_c_high_wd_seed_3.json"
    assert json.loads(exported.read_text()) == {"metadata": {"seed": 3}}
    assert str(exported) in capsys.readouterr().out


def test_two_runs_of_one_name_are_not_exported_over_each_other(
    tmp_path: Path, write_run: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "outputs")
    write_run(tmp_path / "outputs", config_hash="other")
    arguments = [str(tmp_path / "outputs"), "--export", "audit", "--to", str(tmp_path / "data")]
    assert report.main(arguments) == 2
    assert "would both become audit_log_exp_c_high_wd_seed_0.json" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_run_without_a_log_is_named(
    tmp_path: Path, write_run: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path, status="failed")
    (folder / "audit.json").unlink()
    assert report.main([str(folder), "--export", "audit", "--to", str(tmp_path)]) == 2
    assert "audit.json is not there: the run is failed" in capsys.readouterr().err


def test_an_experiment_without_a_report_of_its_own_has_its_values(
    tmp_path: Path, write_run: Writer
) -> None:
    write_run(tmp_path, config={"module._target_": "elsewhere.module.Thing"})
    views = [RunView(record) for record in read_runs(tmp_path)]
    made = studies.study("grokking", views, studies.Extension(tmp_path, []))
    assert [table.title for table in made.tables] == ["Exploratory: final values"]
    assert report.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(("width", "is_refused"), [(128, False), (64, True)])
def test_raw_norm_across_widths_is_refused(
    tmp_path: Path, write_run: Writer, width: int, is_refused: bool
) -> None:
    for seed in range(5):
        write_run(tmp_path, "high_wd", seed)
        write_run(tmp_path, "no_wd", seed, config={"model.d_model": width})
    claim = Claim.model_validate({
        "id": "X", "source": "own", "text": "x", "family": "x", "status": "own", "test": "t",
        "estimand": {"summary": "final", "of": "paired_difference"},
        "arms": {"treatment": "high_wd", "control": "no_wd"},
        "select": {"metric": "amplitude_param.published"}, "direction": "less", "bound": 0.0,
    })  # fmt: skip
    [result] = judge([claim], arms([RunView(record) for record in read_runs(tmp_path)]))
    assert ("grows with the width" in result.verdict.reason) == is_refused
    assert (result.inference is None) == is_refused


def test_no_curve_of_a_figure_with_a_shared_axis_is_cut_off(shown: list[Arm]) -> None:
    [figure] = [f for f in grokking.figures(shown) if f.name == "head_norms"]
    with canvas.style() as plt:
        drawn = figure.draw()
        for axis in drawn.axes:
            highest = max(float(np.max(line.get_ydata())) for line in axis.lines)
            assert axis.get_ylim()[0] == 0
            assert highest <= axis.get_ylim()[1]
        plt.close(drawn)
