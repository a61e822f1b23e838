"""Files of labelled texts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from sift_train.labelled_files import read_labelled


def test_labelled_files_of_every_form(tmp_path: Path) -> None:
    expected = [("a film, good", "pos"), ("bad", "1")]
    forms = {
        "a.jsonl": '{"text": "a film, good", "label": "pos"}\n\n{"text": "bad", "label": 1}\n',
        "a.csv": 'label,text\npos,"a film, good"\n1,bad\n',
        "a.tsv": "text\tlabel\na film, good\tpos\nbad\t1\n",
        "a.txt": "pos a film, good\n1 bad\n",
        "b.txt": "pos\ta film, good\n1\tbad\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        found = read_labelled(tmp_path / name)
        assert [(text, label) for text, label, _ in found] == expected
    (tmp_path / "c.txt").write_text("[POS] good\n{NEG} bad\n")
    assert [label for _, label, _ in read_labelled(tmp_path / "c.txt")] == ["[POS]", "{NEG}"]
    wrong = {
        "a.json": ('{"text": "a b", "label": "c"}', "looks like JSON, but is not named .jsonl"),
        "b.json": ('[\n{"text": "a b"}\n]', "looks like JSON, but is not named .jsonl"),
        "a.csv": ('label,text\na,"' + "b " * 100_000, "line 2 of .* is no row: field larger than"),
        "b.jsonl": ('{"text": 3}', "line 1 of .* has no text under 'text'"),
        "b.csv": ("text,other\na,b\n", "header of .* names the columns 'text', 'other', expected"),
        "b.txt": ("word\n", "line 1 of .* has no space or tab"),
        "c.txt": ("\n", "has no example"),
        "c.jsonl": ("{", "line 1 of .* is no JSON"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labelled(tmp_path / name)


def test_a_label_is_found_on_its_line_after_a_text_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefflabel,text\npos,"a\nb"\n\nneg,c\n', "utf-8")
    found = read_labelled(tmp_path / "a.csv")
    assert found == [("a\nb", "pos", 3), ("c", "neg", 5)]


def pairs(path: Path, content: str) -> list[tuple[str, str]]:
    path.write_text(content)
    return [(example.text, example.label) for example in read_labelled(path)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "label,text\na,b\nsad,Well, a cat\n", "line 3 of .* has 3 fields, and its header names 2; put"),
        ("a.csv", "text,label\nb,a\nsome, more,joy\n", "line 3 of .* has 3 fields"),
        ("a.csv", "text,label\nb,a\nHi, there,\n", "line 3 of .* has 3 fields"),
        ("a.tsv", "text\tlabel\nb\tc\td\n", "line 2 of .* has 3 fields.*; a text must have no tab"),
        ("a.csv", "Text,Label\na,b\n", "header of .* names the columns 'Text', 'Label', expected 'text' and 'label'"),
        ("a.csv", "text;label\na;b\n", "with a comma between them"),
        ("a.csv", "text,label,text\na,b,c\n", "each once"),
        ("a.csv", 'text,label\n"open,a\nb,b\n"other" thing,a\n', "is no row: .*; close its quotes, double"),
        ("a.csv", 'text,label\n"open,a\nb,b\n', "is no row: unexpected end of data"),
        ("a.txt", "\ttext\n", "has no space or tab between a label and a text"),
    ],
)  # fmt: skip
def test_rows_that_could_be_read_wrongly_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labelled(tmp_path / name)


def test_quotes_of_a_table_with_tabs(tmp_path: Path) -> None:
    """They enclose texts if all are closed on their line; else they are part of the texts, and no row is lost."""
    table = tmp_path / "a.tsv"
    head = "text\tlabel\n"
    assert pairs(table, head + '"a ""b"""\tpos\nc\tneg\n') == [('a "b"', "pos"), ("c", "neg")]
    for second in ('"open', '"two" words', 'it ends"'):
        found = pairs(table, f'{head}"open\tpos\nb\tneg\n{second}\tpos\n')
        assert found == [('"open', "pos"), ("b", "neg"), (second, "pos")]


def test_tables_as_other_programs_write_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A separator at the end of each line, texts of several lines, and columns that are not used."""
    found = pairs(tmp_path / "a.csv", " \ntext,label\na,pos,,\n,\nb,neg,,\n")
    assert found == [("a", "pos"), ("b", "neg")]
    found = pairs(tmp_path / "a.tsv", 'text\tlabel\n"a\nb"\tpos\nd\tneg\n')
    assert found == [("a\nb", "pos"), ("d", "neg")]
    found = pairs(tmp_path / "a.tsv", 'label\ttext\tid\npos\t"a\nb"\t1\nneg\td\t2\n')
    assert found == [("a\nb", "pos"), ("d", "neg")]
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open\tpos\nb\tneg\t\nend"\tpos\n')
    with pytest.raises(ValueError, match=r"line 4 of .* not clear whether the quotes are part"):
        read_labelled(tmp_path / "a.tsv")
    assert not caplog.records
    pairs(tmp_path / "b.csv", ",text,text2,label\n0,a,b,pos\n")
    pairs(tmp_path / "b.jsonl", '{"text": "a", "text_pair": "b", "label": 0, "idx": 1}\n')
    assert "b.csv' also has 'text2', which the training does not use" in caplog.text
    assert "b.jsonl' also has 'text_pair', which the training does not use" in caplog.text


def test_labels_end_at_a_tab_or_a_space(tmp_path: Path) -> None:
    """With a tab on each line, at the tab."""
    lines = tmp_path / "a.txt"
    found = pairs(lines, "ham\tgo on\nspam\twin\ta prize\n" * 2)
    assert found == [("go on", "ham"), ("win\ta prize", "spam")] * 2
    found = pairs(lines, "very bad\tno\ngood\tyes it is\n" * 2)
    assert found == [("no", "very bad"), ("yes it is", "good")] * 2
    found = pairs(lines, "bad no\tway\ngood yes\n")
    assert found == [("no\tway", "bad"), ("yes", "good")]
    lines.write_text("pos a good film\tone\nneg a bad film\ttwo\n")
    with pytest.raises(ValueError, match="it is not clear whether its label ends there"):
        read_labelled(lines)
