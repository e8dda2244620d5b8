"""Tests tables of parallel texts and files of pairs as translation tasks."""

import pytest

from tests.parallel_data import sentences, write_jsonl
from train.fit.options import FitOptions
from train.tasks import parallel
from train.tasks.parallel import Direction


def options_of(folder, **changes):
    return FitOptions(backbone="none", output_dir=folder / "run", **changes)


def table(folder, rows, name="train.jsonl"):
    return write_jsonl(folder / name, rows)


def pairs_of(rows):
    return {
        (a, b, x, y) for x, y, a, b in zip(*(rows[name][:] for name in parallel.PAIR), strict=True)
    }


ROWS = [
    {"id_": "1", "en": "ba", "de": "sch", "fr": None, "kind": "summary"},
    {"id_": "2", "en": "do", "de": None, "fr": "eau", "kind": "summary"},
    {"id_": "3", "en": "ki", "de": "ung", "fr": None, "kind": "paragraph"},
]


def test_all_directions_of_a_table(tmp_path):
    """Pairs of columns that a row has both of are directions; other columns are no languages."""
    options = options_of(tmp_path, parallel_files=(table(tmp_path, ROWS),))
    assert parallel.resolved(options).directions == "en-de,en-fr,de-en,fr-en"


def test_directions_that_are_named_may_have_any_columns(tmp_path):
    """Columns with other names than those of languages count if a direction names them."""
    rows = [{"english": "ba", "low-german": "sch"}, {"english": "ki", "low-german": "ung"}]
    files = (table(tmp_path, rows),) * 2
    options = options_of(tmp_path, parallel_files=files, directions="english-low-german")
    task = parallel.load_task(parallel.resolved(options))
    assert task.directions == (Direction("english", "low-german"),)
    assert len(task.splits["train"]) == 2


def test_each_row_gives_the_directions_that_it_has(tmp_path):
    """A row with three languages has six directions, one with null fewer."""
    rows = [*ROWS, {"id_": "4", "en": "lu", "de": "ein", "fr": "oix", "kind": "x"}]
    files = (table(tmp_path, rows), table(tmp_path, ROWS[:2], "validation.jsonl"))
    task = parallel.load_task(parallel.resolved(options_of(tmp_path, parallel_files=files)))
    assert task.kind == "translation"
    assert [direction.name for direction in task.directions] == [
        *("en-de", "en-fr", "de-en", "de-fr", "fr-en", "fr-de")
    ]
    found = pairs_of(task.splits["train"])
    assert len(task.splits["train"]) == 6 + 2 * 3
    assert {("de", "fr", "ein", "oix"), ("fr", "en", "eau", "do")} < found
    assert pairs_of(task.splits["validation"]) == {
        ("en", "de", "ba", "sch"),
        ("de", "en", "sch", "ba"),
        ("en", "fr", "do", "eau"),
        ("fr", "en", "eau", "do"),
    }
    assert "  en-de: 3, 1" in task.user_messages()


def test_rows_that_are_held_out_are_not_trained_on(tmp_path):
    """Without a second table the same rows are held out every time, in all directions at once."""
    rows = [{"en": f"en {i}", "de": f"de {i}"} for i in range(120)]
    options = options_of(tmp_path, parallel_files=(table(tmp_path, rows),))
    tasks = [parallel.load_task(parallel.resolved(options)) for _ in range(2)]
    train, held = (pairs_of(tasks[0].splits[split]) for split in ("train", "validation"))
    assert (len(train), len(held)) == (2 * 118, 2 * 2)
    assert held == pairs_of(tasks[1].splits["validation"])
    numbers = [{text.split()[1] for _, _, text, _ in part} for part in (train, held)]
    assert not numbers[0] & numbers[1]
    assert tasks[0].user_messages()[0].startswith("2 rows of ")


def test_files_of_pairs(tmp_path):
    """Directions are those of the training file, or the ones that are asked for."""
    rows = [
        {"source": "ba", "target": "sch", "source_language": "en", "target_language": "de"},
        {"source": "sch", "target": "ba", "source_language": "de", "target_language": "en"},
        {"source": "ba", "target": "sch", "source_language": "en", "target_language": "zh-Hans"},
    ]
    file = table(tmp_path, rows)
    options = options_of(tmp_path, train_file=file, validation_file=file)
    resolved = parallel.resolved(options)
    assert resolved.directions == "de-en,en-de,en-zh-Hans"
    assert parallel.load_task(resolved).directions[2] == Direction("en", "zh-Hans")
    one = parallel.resolved(options_of(tmp_path, train_file=file, directions="en-zh-Hans"))
    task = parallel.load_task(one)
    assert pairs_of(task.splits["train"]) == {("en", "zh-Hans", "ba", "sch")}


def test_an_empty_field_of_a_csv_is_null(tmp_path):
    """A .csv has no other way to leave a text out."""
    path = tmp_path / "train.csv"
    path.write_text("en,de\nba,sch\ndo,\n", encoding="utf-8")
    options = options_of(tmp_path, parallel_files=(path, path), directions="en-de")
    task = parallel.load_task(parallel.resolved(options))
    assert pairs_of(task.splits["train"]) == {("en", "de", "ba", "sch")}


def test_members_of_directions_and_targets():
    """An adapter serves one direction, or all directions into its language."""
    directions = [Direction("en", "de"), Direction("fr", "de"), Direction("de", "en")]
    each = parallel.members_of(directions, "per_direction")
    assert list(each) == ["en-de", "fr-de", "de-en"]
    targets = parallel.members_of(directions, "per_target")
    assert targets == {"de": tuple(directions[:2]), "en": (directions[2],)}
    assert parallel.members_of(directions, "shared") is None


def test_other_tasks_are_left_alone(tmp_path):
    """Options without parallel texts stay as they are; flags of translation are refused."""
    file = table(tmp_path, [{"sentence": text["en"], "target": "x"} for text in sentences(2)])
    options = options_of(tmp_path, train_file=file)
    assert parallel.resolved(options) is options
    with pytest.raises(ValueError, match="--temperature is for translation between several"):
        parallel.resolved(options_of(tmp_path, train_file=file, temperature=2.0))
