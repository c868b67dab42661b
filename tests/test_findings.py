"""What the scores say in words: sentences against cases made by hand, and tables that agree with scores.json."""

import json
import re

import pytest
from scipy.stats import binom

from inference.llava_hound_dpo.evaluate import evaluate, main
from inference.llava_hound_dpo.findings import latex_tables, markdown, markdown_tables, sentences, tables
from inference.llava_hound_dpo.report import report
from llava.markdown import interval, latex, number, tex


@pytest.fixture
def scored(tmp_path):
    """Scores of files with a mark a question, by format: 1 right, 0 wrong, - not answered."""

    def run(**files):
        paths = []
        for name, marks in files.items():
            paths.append(tmp_path / f"{name}.jsonl")
            answers = [answer(t, n, mark) for t, text in marks.items() for n, mark in enumerate(text) if mark != "-"]
            paths[-1].write_text("".join(json.dumps(one) + "\n" for one in answers))
        return evaluate(paths)

    return run


def answer(image_type, number, mark):
    target, count = {"multi": (None, 2), "sequence": (2, 2), "collage": (2, 1)}.get(image_type, (1, 1))
    one = {"question_id": f"{image_type} {number}", "text": "red" if mark == "1" else "blue", "answer": "red"}
    return one | {"image_type": image_type, "target": target, "num_images": count}


FIRST = {
    "sequence": "0" * 10 + "1" * 10,
    "collage": "000111" + "1111",
    "pip": "1" * 10,
    "single": "00000",
    "multi": "01",
}
SECOND = {"sequence": "1" * 8 + "00" + "1" * 10, "collage": "111000" + "1111", "pip": "0" * 8 + "11", "single": "1" * 5,
          "multi": "01"}  # fmt: skip


def test_what_got_better_and_worse_by_hand(scored):
    """Eight of twenty better: resampled, the difference is Binomial(20, 0.4) / 20. Five changed say nothing yet."""
    scores, _ = scored(base=FIRST, tuned=SECOND)
    low, high = (100 * binom.ppf([0.025, 0.975], 20, 0.4) / 20).tolist()
    assert (low, high) == (20, 60)
    fewest, most = binom.ppf([0.025, 0.975], 10, 0.8).tolist()
    (c,) = scores["comparisons"]
    assert c["difference"] == pytest.approx((8 - 8 + 5) / 47) and c["changed"] == 8 + 6 + 8 + 5
    both = c["by_format"]["collage"]
    assert (both["only_first_right"], both["only_second_right"], both["mcnemar_p"]) == (3, 3, 1)
    undecided = ", ".join([
        f"all {interval(c, 'difference', '+.1f')}",
        f"collage +0.0 [{100 * both['low']:.1f}, +{100 * both['high']:.1f}]",
        "single +100.0 [+100.0, +100.0] (5 scores changed)", "multi +0.0 [+0.0, +0.0] (0 scores changed)",
    ])  # fmt: skip
    why = "as the interval includes 0 or fewer than 6 scores changed"
    assert sentences(scores) == [
        ("better", f"Better in tuned than in base: sequence +40.0 [+{low:.1f}, +{high:.1f}]."),
        ("worse", f"Worse in tuned than in base: pip -80.0 [-{10 * most:.1f}, -{10 * fewest:.1f}]."),
        ("open", f"Open between tuned and base, {why}: {undecided}."),
    ]


def test_nothing_changed_is_said_plainly(scored):
    """Of one format, all questions and the format are the same; every file is held against the first."""
    scores, rows = scored(a={"sequence": "0011"}, b={"sequence": "0011"}, c={"sequence": "0111"})
    texts = [text for _, text in sentences(scores)]
    assert texts[:2] == ["Better in b than in a: nothing.", "Worse in b than in a: nothing."]
    assert texts[2].endswith("scores changed: all +0.0 [+0.0, +0.0] (0 scores changed).")
    assert texts[3] == "Better in c than in a: nothing." and len(texts) == 6
    page = report(scores, rows)
    assert all(text.split(":")[0] in page for text in texts) and page.index("<svg") < page.index("Better in b")
    assert page.index("Better in b") < page.index("<table")


def test_one_file_has_nothing_to_be_compared_with(scored):
    scores, rows = scored(base={"sequence": "01", "pip": "1"})
    assert sentences(scores) == [("open", "One answers file: nothing to compare it with; --answers takes more.")]
    assert "comparisons" not in [own.name for own in tables(scores)] and "Differences are" not in report(scores, rows)


def test_a_file_that_misses_a_format_loses_it_and_it_is_said(scored):
    scores, rows = scored(base={"sequence": "11111111", "pip": "11"}, tuned={"sequence": "--------", "pip": "1-"})
    kinds = dict(sentences(scores))
    assert kinds["worse"].endswith("all -90.0 [-100.0, -70.0], sequence -100.0 [-100.0, -100.0].")
    assert kinds["missing"] == "tuned has no answer to 8 of 8 sequence, 1 of 2 pip questions, which count as wrong."
    assert kinds["missing"] in report(scores, rows) and kinds["missing"] in markdown(scores)


def test_without_ratios_others_and_targets_every_table_stands(scored):
    """What is not known is "-", and no row is left out for it."""
    scores, rows = scored(base={"multi": "01"}, tuned={"multi": "11"})
    found = {own.name: {row[0]: row[1:] for row in own.rows} for own in tables(scores)}
    assert found["attention"]["attention ratio"] == ["-", "-"] == found["confusion"]["their share"]
    assert found["attention"]["where it looked is unknown"] == ["2", "2"]
    assert found["accuracy_format"]["multi"][-1] == "-" and "accuracy_sequence" not in found
    assert "<svg" in report(scores, rows)


# ---- Markdown and LaTeX


def parsed(text):
    """The rows of tables by their first cell, under the title of each."""
    parts = re.split(r"(?m)^## ", text)[1:]
    rows = {part.split("\n")[0]: re.findall(r"(?m)^\| (.*) \|$", part)[2:] for part in parts}
    return {title: {row.split(" | ")[0]: row.split(" | ")[1:] for row in own} for title, own in rows.items()}


def test_markdown_has_the_numbers_of_the_scores(scored):
    scores, _ = scored(base=FIRST, tuned=SECOND)
    found, files = parsed(markdown(scores)), scores["answers"]
    accuracy = found["Accuracy by format, % [95 % interval]"]
    for name in ("sequence", "collage", "pip", "single", "multi"):
        own = [file["by_format"][name] for file in files.values()]
        wanted = [f"{100 * o['accuracy']:.1f} [{100 * o['low']:.1f}, {100 * o['high']:.1f}]" for o in own]
        assert accuracy[name][:3] == [str(own[0]["questions"]), *wanted]
    assert found["Answers"]["wrong"] == [str(file["overall"]["wrong"]) for file in files.values()]
    assert len(found["Accuracy, second - first, points [95 % interval], paired by question"]) == 1 + 5
    assert markdown(scores).endswith(markdown_tables(scores))


def test_latex_has_the_same_cells_and_is_balanced(scored):
    scores, _ = scored(**{"a_b": FIRST, "50% & more": SECOND})
    text = latex_tables(scores)
    assert r"a\_b" in text and r"50\% \& more" in text
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == len(tables(scores))
    bare = re.sub(r"\\[\\{}$&#_%]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") == 2 * bare.count("$-$")
    assert "%" not in bare.replace("% Needs", "") and not re.search(r"[_#~^<>|]", bare)
    for own, block in zip(tables(scores), text.split(r"\toprule")[1:], strict=True):
        lines = [line for line in block.split("\n") if line.endswith(r"\\")]
        assert len(lines) == 1 + len(own.rows)
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(own.head) - 1 for line in lines)
        (columns,) = re.findall(r"begin{tabular}{(l+r+)}\n$", text[: text.index(block) - len(r"\toprule")])
        assert len(columns) == len(own.head)


def test_every_character_stands_for_itself_in_latex():
    assert tex(r"\a{b}$c&d#e_f%~^<>|[`") == (
        r"\textbackslash{}a\{b\}\$c\&d\#e\_f\%\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"
        r"{[}\textasciigrave{}"
    )
    assert tex("-1.5 [-2.0, +3.0]") == "$-$1.5 {[}$-$2.0, +3.0{]}"
    assert tex("llava-1.5 a--b\nc") == "llava-1.5 a-{}-b c"
    assert latex(["", "x"], [["[a]", "-"]]).split("\n")[4] == r"{[}a{]} & - \\"


def test_numbers_with_intervals():
    assert interval({"mean": 0.5, "low": 0.25, "high": 1}) == "50.0 [25.0, 100.0]"
    assert interval({"mean": 0.5, "low": None, "high": None}) == "50.0" and interval(None) == interval({}) == "-"
    assert number(-1e-12, "+.1f") == "+0.0" and number(None) == number("x") == "-" and number(0.5, ".3f", 1) == "0.500"


def run(tmp_path, table, output="out"):
    (tmp_path / "a.jsonl").write_text(json.dumps(answer("pip", 1, "1")))
    main(["--answers", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / output), "--table", str(tmp_path / table)])


def test_the_tables_alone(tmp_path):
    for name, start in (("paper/t.tex", "% Needs \\usepackage{booktabs}."), ("t.md", "## Accuracy by format")):
        run(tmp_path, name)
        assert (tmp_path / name).read_text().startswith(start)
    assert (tmp_path / "out/scores.md").read_text().endswith((tmp_path / "t.md").read_text())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("t.csv", "ends in .tex or .md"),
        ("out/scores.md", "a file of its own"),
        ("a.jsonl", "would be overwritten"),
    ],
)
def test_a_table_that_cannot_be_written_is_said_before_any_work(tmp_path, capsys, table, message):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, table)
    assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()
