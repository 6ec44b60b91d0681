"""Prepared datasets: what is stored, when it is prepared anew, what is refused, and the order."""

import json
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data import prompts, sources
from jaxrl_llm.data.prompts import DataConfig, dataset_digest, load_prompts, prompt_indices
from jaxrl_llm.data.tasks import ALPHABET
from jaxrl_llm.data.tokenizer import CharacterTokenizer

PRINTABLE = CharacterTokenizer("\n" + "".join(map(chr, range(32, 127))) + "éß世")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"network access: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_jsonl(path: pathlib.Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "answer": f"{i}"} for i in range(count)]


def jsonl_config(tmp_path: pathlib.Path, rows: Sequence[object], heldout: int = 2) -> DataConfig:
    return DataConfig(
        kind="jsonl",
        files=(write_jsonl(tmp_path / "rows.jsonl", rows),),
        data_dir=str(tmp_path / "prepared"),
        heldout_size=heldout,
    )


def texts(config: DataConfig, split: prompts.Split) -> list[str]:
    source = load_prompts(config, PRINTABLE, split)
    return [source[index].text for index in range(len(source))]


def test_addition_splits_are_disjoint_complete_and_tokenized(tmp_path: pathlib.Path) -> None:
    config = DataConfig(size=300, heldout_size=40, data_dir=str(tmp_path))
    tokenizer = CharacterTokenizer(ALPHABET)
    train = load_prompts(config, tokenizer, "train")
    heldout = load_prompts(config, tokenizer, "heldout")
    assert (len(train), len(heldout), train.duplicates) == (300, 40, 0)
    everything = [source[i] for source in (train, heldout) for i in range(len(source))]
    assert len({prompt.text for prompt in everything}) == 340
    for prompt in everything:
        left, right = (int(number) for number in prompt.text.rstrip("=").split("+"))
        assert int(prompt.answer) == left + right
        assert tokenizer.decode(prompt.tokens.tolist()) == prompt.text == prompt.prompt_id
        assert prompt.demonstration.endswith("#" + prompt.answer)


def test_jsonl_rows_keep_their_order_fields_and_unicode(tmp_path: pathlib.Path) -> None:
    rows = [
        {"prompt": "é ß", "answer": "世", "id": "first", "demonstration": "é\n世", "other": 1},
        {"prompt": "second {x}", "answer": "\\frac{1}{2}"},
        *numbered(30),
    ]
    config = jsonl_config(tmp_path, rows, heldout=5)
    train, heldout = (load_prompts(config, PRINTABLE, split) for split in ("train", "heldout"))
    everything = [source[i] for source in (train, heldout) for i in range(len(source))]
    by_text = {prompt.text: prompt for prompt in everything}
    assert len(by_text) == len(rows)
    order = [row["prompt"] for row in rows]
    for source in (train, heldout):
        found = [order.index(source[i].text) for i in range(len(source))]
        assert found == sorted(found)
    first = by_text["é ß"]
    assert (first.prompt_id, first.answer, first.demonstration) == ("first", "世", "é\n世")
    assert by_text["second {x}"].answer == "\\frac{1}{2}"
    assert by_text["second {x}"].demonstration == ""
    assert len({prompt.prompt_id for prompt in everything}) == len(rows)


def test_the_template_surrounds_the_prompt_and_leaves_braces_alone(tmp_path: pathlib.Path) -> None:
    config = jsonl_config(tmp_path, [{"prompt": "what is {x}?", "answer": "1"}, *numbered(3)])
    plain = texts(config, "train")
    framed = DataConfig(**{**vars(config), "template": "Q: {prompt}\nAnswer in \\boxed{}."})
    assert texts(framed, "train") == [f"Q: {text}\nAnswer in \\boxed{{}}." for text in plain]
    assert dataset_digest(framed) == dataset_digest(config), "stored without the template"


def test_heldout_files_make_the_heldout_split(tmp_path: pathlib.Path) -> None:
    shared = {"prompt": "in both", "answer": "7"}
    config = DataConfig(
        kind="jsonl",
        files=(write_jsonl(tmp_path / "a.jsonl", [*numbered(4), shared, shared]),),
        heldout_files=(
            write_jsonl(tmp_path / "b.jsonl", [shared, {"prompt": "new", "answer": "8"}]),
        ),
        data_dir=str(tmp_path / "prepared"),
    )
    assert texts(config, "train") == [f"question {i}" for i in range(4)]
    assert texts(config, "heldout") == ["in both", "new"]
    assert load_prompts(config, PRINTABLE, "train").duplicates == 2


def test_repeated_rows_are_left_out_and_counted(tmp_path: pathlib.Path) -> None:
    config = jsonl_config(tmp_path, numbered(6) + numbered(4))
    assert len(texts(config, "train")) == 4
    assert len(texts(config, "heldout")) == 2
    assert load_prompts(config, PRINTABLE, "heldout").duplicates == 4


def test_reasoning_gym_tasks_become_prompts(tmp_path: pathlib.Path) -> None:
    config = DataConfig(
        kind="reasoning_gym",
        task="chain_sum",
        task_settings='{"max_terms": 2, "max_digits": 1}',
        size=60,
        heldout_size=10,
        data_dir=str(tmp_path),
    )
    train, heldout = (load_prompts(config, PRINTABLE, split) for split in ("train", "heldout"))
    assert len(heldout) == 10
    assert len(train) + len(heldout) + train.duplicates == 70
    assert not set(texts(config, "train")) & set(texts(config, "heldout"))
    for index in range(len(train)):
        expression = train[index].text.split(":")[1].split("=")[0].split()
        total = int(expression[0])
        for sign, number in zip(expression[1::2], expression[2::2], strict=True):
            total += int(number) if sign == "+" else -int(number)
        assert int(train[index].answer) == total


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("no_such_task", "{}", "task 'no_such_task' with settings {} was refused"),
        ("chain_sum", '{"wrong": 1}', "unexpected keyword argument 'wrong'"),
        ("chain_sum", '{"min_terms": 9, "max_terms": 2}', "was refused"),
    ],
)
def test_reasoning_gym_refusals_name_the_task(task: str, settings: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources.reasoning_gym_rows(task, json.loads(settings), seed=0, count=2)


def test_a_second_run_reads_what_the_first_wrote(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jsonl_config(tmp_path, numbered(9))
    first = texts(config, "train"), texts(config, "heldout")
    monkeypatch.setattr(prompts, "read_rows", lambda config: pytest.fail("prepared again"))
    assert (texts(config, "train"), texts(config, "heldout")) == first
    assert load_prompts(config, PRINTABLE, "train").duplicates == 0


def test_a_dataset_keeps_its_digest_when_a_file_is_lost(tmp_path: pathlib.Path) -> None:
    """It goes into every checkpoint of a run, which needs its files no more."""
    config = jsonl_config(tmp_path, numbered(9))
    wanted = dataset_digest(config)
    sources = [load_prompts(config, PRINTABLE, split) for split in ("train", "heldout")]
    pathlib.Path(config.files[0]).unlink()
    assert [source.dataset for source in sources] == [wanted, wanted]


def test_a_changed_file_or_setting_is_another_dataset(tmp_path: pathlib.Path) -> None:
    config = jsonl_config(tmp_path, numbered(9))
    before = {*texts(config, "train"), *texts(config, "heldout")}
    changed = jsonl_config(tmp_path, [*numbered(9), {"prompt": "added", "answer": "1"}])
    assert changed == config, "only the file's content differs"
    assert {*texts(changed, "train"), *texts(changed, "heldout")} == before | {"added"}
    variants = [
        DataConfig(),
        DataConfig(seed=1),
        DataConfig(size=5),
        DataConfig(heldout_size=5),
        DataConfig(kind="reasoning_gym", task="chain_sum"),
        DataConfig(kind="reasoning_gym", task="chain_sum", task_settings='{"max_terms": 3}'),
        DataConfig(kind="reasoning_gym", task="chain_sum", seed=1),
        DataConfig(kind="reasoning_gym", task="base_conversion"),
    ]
    assert len({dataset_digest(variant) for variant in variants}) == len(variants)
    assert dataset_digest(DataConfig(data_dir="elsewhere")) == dataset_digest(DataConfig())


def test_interrupted_preparation_leaves_nothing_that_counts(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jsonl_config(tmp_path, numbered(9))

    def broken(config: DataConfig) -> sources.SplitRows:
        rows = whole(config)
        rows.heldout[1] = None  # type: ignore[call-overload]
        return rows

    whole = prompts.read_rows
    monkeypatch.setattr(prompts, "read_rows", broken)
    with pytest.raises(AttributeError, match="prompt_id"):
        texts(config, "train")
    monkeypatch.setattr(prompts, "read_rows", whole)
    assert len(texts(config, "train")) == 7


def test_two_processes_preparing_the_same_dataset_both_succeed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jsonl_config(tmp_path, numbered(9))
    whole = prompts.read_rows

    def overtaken(config: DataConfig) -> sources.SplitRows:
        """While this one reads, another one starts and finishes."""
        monkeypatch.setattr(prompts, "read_rows", whole)
        prompts.prepare(config)
        return whole(config)

    monkeypatch.setattr(prompts, "read_rows", overtaken)
    assert len(texts(config, "train")) == 7


def test_preparation_is_silent(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts(jsonl_config(tmp_path, numbered(9)), "train")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not caplog.records


def test_neither_tensorflow_nor_jax_is_imported(tmp_path: pathlib.Path) -> None:
    program = (
        "import sys; from jaxrl_llm.data.prompts import *; "
        "from jaxrl_llm.data.tokenizer import CharacterTokenizer; "
        f"config = DataConfig(size=8, heldout_size=2, data_dir={str(tmp_path)!r}); "
        "source = load_prompts(config, CharacterTokenizer('0123456789+=#'), 'train'); "
        "source[0]; print(len(source), [m for m in ('tensorflow', 'jax') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "8 []"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[1]", "line 3: a list; write one object per line"),
        ('{"prompt": "x"}', "line 3: field 'answer' is missing"),
        ('{"prompt": "x", "answer": 5}', "line 3: field 'answer' is 5, a int; write it as a text"),
        ('{"prompt": " ", "answer": "5"}', "line 3: field 'prompt' is empty"),
        ('{"prompt": "x", "answer": ""}', "line 3: field 'answer' is empty"),
        ('{"prompt": "x", "answer": "1", "id": null}', "line 3: field 'id' is None"),
        ('{"prompt": "\\ud800", "answer": "1"}', "line 3: field 'prompt' is not valid Unicode"),
        ('{"prompt": "a", "answer": "2"}', "line 3: same prompt as .*line 1 but answer '2'"),
        (
            '{"prompt": "x", "answer": "2", "id": "a1"}',
            "line 3: field 'id' is 'a1', as in .*line 1",
        ),
    ],
)
def test_bad_rows_are_refused_by_file_line_and_field(
    tmp_path: pathlib.Path, line: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "1", "id": "a1"}}\n\n{line}\n')
    config = DataConfig(
        kind="jsonl", files=(str(path),), data_dir=str(tmp_path / "prepared"), heldout_size=1
    )
    with pytest.raises(ValueError, match=rf"bad\.jsonl {message}"):
        load_prompts(config, PRINTABLE, "train")


def test_unreadable_files_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "\xe9", "answer": "1"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl cannot be read as UTF-8"):
        sources.jsonl_rows([str(latin)])
    with pytest.raises(ValueError, match=r"'nowhere\.jsonl' cannot be read"):
        dataset_digest(DataConfig(kind="jsonl", files=("nowhere.jsonl",)))


def test_too_few_prompts_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="2 distinct prompts and heldout_size is 2"):
        texts(jsonl_config(tmp_path, numbered(2)), "train")


def test_a_prompt_the_tokenizer_cannot_write_is_named(tmp_path: pathlib.Path) -> None:
    config = jsonl_config(tmp_path, [{"prompt": "abc", "answer": "1", "id": "p7"}, *numbered(3)])
    found = []
    for split in ("train", "heldout"):
        source = load_prompts(config, CharacterTokenizer("question 0123456789"), split)
        for index in range(len(source)):
            try:
                found.append(source[index].text)
            except ValueError as error:
                assert "prompt 'p7'" in str(error)  # noqa: PT017 (it may be in either split)
                found.append("p7")
    assert sorted(found) == ["p7", *(f"question {i}" for i in range(3))]


def test_an_index_out_of_range_ends_iteration(tmp_path: pathlib.Path) -> None:
    source = load_prompts(jsonl_config(tmp_path, numbered(6)), PRINTABLE, "train")
    assert len(list(source)) == 4
    with pytest.raises(IndexError, match="prompt index -1 is outside"):
        source[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"heldout_size": 0}, "heldout_size is 0"),
        ({"template": "no place"}, "must contain {prompt}"),
        ({"kind": "jsonl"}, "needs at least one"),
        ({"files": ("a",)}, 'files belong to kind "jsonl"'),
        ({"heldout_files": ("a",)}, "heldout_files is"),
        ({"task": "chain_sum"}, 'a task belongs to kind "reasoning_gym"'),
        ({"kind": "reasoning_gym"}, "which needs one"),
        ({"task_settings": "{"}, "which is not JSON"),
        ({"task_settings": "[]"}, "give a JSON object"),
        ({"task_settings": '{"seed": 1}'}, "without size and seed"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 3), st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once(size: int, epoch: int, seed: int) -> None:
    order = prompt_indices(size, epoch * size, size, seed)
    assert sorted(order.tolist()) == list(range(size))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 200), st.data())
def test_the_order_does_not_depend_on_where_it_is_taken_up(
    size: int, cursor: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, size // 2))
    together = prompt_indices(size, cursor, count, seed=3)
    assert len(set(together.tolist())) == count, "distinct, also across the end of an epoch"
    one_by_one = [int(prompt_indices(size, cursor + i, 1, seed=3)[0]) for i in range(count)]
    assert together.tolist() == one_by_one


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(prompt_indices(50, epoch * 50, 50, seed).tolist())
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


def test_more_prompts_than_can_be_distinct_are_refused() -> None:
    with pytest.raises(ValueError, match="5 prompts at once of 4"):
        prompt_indices(4, 0, 5, 0)
    assert len(prompt_indices(8, 24, 8, 0)) == 8
    repeats = 0
    for cursor in range(24, 64):
        try:
            assert len(np.unique(prompt_indices(8, cursor, 7, 0))) == 7
        except ValueError as error:
            assert "ask for at most 4" in str(error)  # noqa: PT017 (only some cursors repeat)
            repeats += 1
    assert repeats > 0
    with pytest.raises(ValueError, match="out of range"):
        prompt_indices(4, -1, 1, 0)
