"""Sources of every format, what is wrong with rows, examples of texts and of chats."""

import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mmjax.chat import render_chat
from mmjax.config import ConfigError
from mmjax.tokenizer import BOS, EOS
from train.config import DataConfig, JobConfig, SourceConfig
from train.data.documents import Source, decode
from train.data.examples import ChatEncoder, Example, Skipped, TextEncoder
from train.data.pipeline import make_stream, sample_texts
from train.data.streams import counts
from train.data.tokenizer import main as train_main
from train.data.tokenizer import train_tokenizer

TEXTS = [f"Document {n} says {n * n}." for n in range(25)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\n1 and 1\n</think>\n\n2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300, words=True)


def write_jsonl(folder, rows, name="a.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(folder, rows):
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return path


def write_array_record(folder, rows):
    path = folder / "a.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for n, row in enumerate(rows):
        plain = n % 2 and "text" in row
        writer.write((row["text"] if plain else json.dumps(row)).encode())
    writer.close()
    return path


def write_datasets(folder, rows):
    """As `datasets.Dataset.save_to_disk` writes it, in two files."""
    path = folder / "saved"
    path.mkdir()
    table, names = pyarrow.Table.from_pylist(rows), []
    for n, part in enumerate([table[:7], table[7:]]):
        names.append(f"data-{n:05}-of-00002.arrow")
        with pyarrow.ipc.new_stream(str(path / names[-1]), table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (path / "state.json").write_text(json.dumps(state))
    return path


WRITERS = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrayrecord": write_array_record,
    "datasets": write_datasets,
}


def source(*paths, **fields):
    return Source(SourceConfig("s", tuple(map(str, paths)), **fields))


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_its_rows_in_order(form, tmp_path):
    path = WRITERS[form](tmp_path, [{"text": text, "id": 3} for text in TEXTS])
    for given in (form, ""):
        rows = source(path, format=given)
        assert len(rows) == len(TEXTS)
        assert [rows[n].row["text"] for n in range(len(rows))] == TEXTS
    assert list(source(path).blocks) == ([4] * 6 + [1] if form == "parquet" else [])


@pytest.mark.parametrize("form", WRITERS)
def test_chats_come_from_every_format(form, tmp_path, tokenizer):
    path = WRITERS[form](tmp_path, [{"messages": CHAT}] * 9)
    record = source(path, kind="chat")[8]
    example = ChatEncoder(tokenizer, "messages", 1000, "keep")(record)
    assert isinstance(example, Example)
    assert tokenizer.decode(example.ids) == render_chat(CHAT, reply=False).rstrip("\n")


def test_rows_that_datasets_selected(tmp_path):
    path = write_datasets(tmp_path, [{"text": text} for text in TEXTS])
    chosen = pyarrow.table({"indices": pyarrow.array([8, 3, 24], pyarrow.uint64())})
    with pyarrow.ipc.new_stream(str(path / "indices.arrow"), chosen.schema) as writer:
        writer.write_table(chosen)
    state = json.loads((path / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (path / "state.json").write_text(json.dumps(state))
    rows = source(path)
    assert [rows[n].row["text"] for n in range(len(rows))] == [TEXTS[8], TEXTS[3], TEXTS[24]]


def test_files_of_several_formats_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    write_jsonl(tmp_path, [{"text": "three"}, {"text": "four"}])
    (tmp_path / "empty.txt").write_text("")
    rows = source(tmp_path / "*")
    assert [rows[n].row["text"] for n in range(len(rows))] == ["three", "four", "one\ntwo\n"]
    assert rows.empty == [str(tmp_path / "empty.txt")]


def test_standard_library_is_a_corpus():
    rows = source(format="stdlib")
    assert len(rows) > 300
    assert any(record.place.endswith("argparse.py") for record in map(rows.__getitem__, range(60)))


LINES = '{"text": "one"}\n{"text": "two"}\n'
ARRAY = ' [{"text": "one"},\n {"text": "two"}]'


@pytest.mark.parametrize(
    ("name", "data"),
    [("A.JSONL", LINES), ("a.ndjson", LINES), ("a.json", LINES), ("a.json", ARRAY)],
)
def test_other_suffixes_of_json(tmp_path, name, data):
    (tmp_path / name).write_text(data)
    rows = source(tmp_path / name)
    assert [rows[n].row["text"] for n in range(len(rows))] == ["one", "two"]


def test_items_of_an_array_that_are_no_objects(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}, "two"]')
    assert source(tmp_path / "a.json")[1].problem == "is no JSON object: 'two'"
    (tmp_path / "b.json").write_text("[1, ")
    refused(r"b\.json is no JSON array", tmp_path / "b.json")


def test_file_that_several_patterns_match_is_read_once(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path, [{"text": text} for text in TEXTS])
    monkeypatch.chdir(tmp_path)
    assert len(source(path, tmp_path / "*", "a.jsonl", "./*.jsonl")) == len(TEXTS)


@pytest.mark.parametrize("data", ['{"text": "a"}', '{"text": "a"}\n', '\n\n{"text": "a"}\n\n\n'])
def test_breaks_around_lines_are_no_rows(tmp_path, data):
    (tmp_path / "a.jsonl").write_text(data)
    rows = source(tmp_path / "a.jsonl")
    assert [rows[n].row for n in range(len(rows))] == [{"text": "a"}]


def test_lines_across_the_stretches_that_are_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.documents._STRETCH", 7)
    rows = source(write_jsonl(tmp_path, [{"text": text} for text in TEXTS]))
    assert [rows[n].row["text"] for n in range(len(rows))] == TEXTS


def test_jsonl_strings_may_hold_line_separators(tmp_path):
    text = "a\u2028b\x85c\x0cd"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line + "\n", encoding="utf-8")
    assert source(tmp_path / "a.jsonl")[0].row["text"] == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_tell_the_encoding(encoding):
    assert decode("Grüße, 世界".encode(encoding), "utf-8") == ("Grüße, 世界", False)


def test_other_encodings_are_named_or_counted(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes("Grüße".encode("cp1252"))
    named = source(tmp_path / "a.txt", encoding="cp1252")[0]
    assert (named.row["text"], named.undecodable) == ("Grüße", False)
    example = TextEncoder(tokenizer, "text")(source(tmp_path / "a.txt")[0])
    assert example.undecodable
    assert tokenizer.decode(example.ids) == f"Gr\ufffd\ufffde{EOS}"


# Files that are not what they should be.


def refused(says, *paths, **fields):
    with pytest.raises(ConfigError, match=says):
        source(*paths, **fields)


def test_files_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.parquet").write_text("no")
    (tmp_path / "a.arrayrecord").write_text("no")
    (tmp_path / "a.jsonl.gz").write_text("no")
    (tmp_path / "b.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    refused(r"'s': .*nowhere.* matches no file", tmp_path / "nowhere*.txt")
    refused(r"'s': no rows in the 1 files", tmp_path / "a.txt")
    refused(r"a\.parquet is no Parquet file", tmp_path / "a.parquet")
    refused(r"a\.arrayrecord is no ArrayRecord file", tmp_path / "a.arrayrecord")
    refused(r"unpack .*a\.jsonl\.gz first", tmp_path / "a.jsonl.gz")
    for name in ("b.zip", "c.TGZ", "d.tar"):
        (tmp_path / name).write_text("no")
        refused(f"unpack .*{name} first", tmp_path / name)
    refused("encoding 'utf8x': unknown", tmp_path / "a.txt", encoding="utf8x")
    refused("'base64' is not a text encoding", tmp_path / "a.txt", encoding="base64")
    refused("'s' names no paths")
    refused(r"b\.jsonl is UTF-16", tmp_path / "b.jsonl")
    refused(r"several splits; name one of them, as .*train", tmp_path / "splits")
    path = write_datasets(tmp_path, [{"body": text} for text in TEXTS])
    refused(r"no column 'text'; it has body", path)
    (path / "data-00000-of-00002.arrow").write_text("no")
    refused(r"no Arrow file", path)
    (path / "state.json").write_text("{}")
    refused(r"state\.json is not of `save_to_disk`: KeyError", path)


def test_rows_of_parquet_that_cannot_be_read_are_malformed(tmp_path, tokenizer):
    """Bytes that are no UTF-8, and a row group whose pages are damaged."""
    buffers = pyarrow.array([b"fine", b"\xff no"]).buffers()
    wrong = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    (tmp_path / "b").mkdir()
    path = write_parquet(tmp_path / "b", [{"text": text * 9} for text in TEXTS])
    meta = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = meta.dictionary_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows, encode = source(tmp_path / "a.parquet", path), TextEncoder(tokenizer, "text")
    found = [encode(rows[n]) for n in range(7)]
    assert [getattr(one, "kind", "") for one in found] == ["", *["malformed"] * 5, ""]
    assert "a.parquet row 1 is no UTF-8" in found[1].message
    assert "row 0 is in a damaged row group" in found[2].message


# Rows.


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('{"text": "cut', "malformed"),
        ('{"body": "x"}', "malformed"),
        ('["text"]', "malformed"),
        ("3", "malformed"),
        ('{"text": null}', "malformed"),
        ('{"text": "\\ud800"}', "malformed"),
        ("[" * 100_000, "malformed"),
        ('{"text": " "}', "empty"),
        ("  ", "empty"),
    ],
)
def test_lines_that_are_no_document(tmp_path, tokenizer, line, kind):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    rows = source(tmp_path / "a.jsonl")
    found = TextEncoder(tokenizer, "text")(rows[1])
    assert isinstance(found, Skipped)
    assert found.kind == kind
    assert "a.jsonl at byte 17" in found.message


def test_whole_text_is_predicted_and_closed(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    example = TextEncoder(tokenizer, "text")(source(tmp_path / "a.txt")[0])
    assert tokenizer.decode(example.ids) == f"abc{EOS}"
    assert example.loss_mask.all()


def test_bad_rows_are_counted_by_their_kind(tmp_path, tokenizer, capsys):
    good = [json.dumps({"text": text}) for text in TEXTS]
    bad = ["{", "  ", json.dumps({"text": "a" * 500})]
    (tmp_path / "a.jsonl").write_bytes("\n".join([*good, *bad]).encode() + b'\n{"text": "\xff"}')
    (tmp_path / "b.jsonl").write_text("")
    paths = (str(tmp_path / "*.jsonl"),)
    data = DataConfig(paths=paths, sequence_length=64, batch_size=1, bad_share=0.1)
    stream = make_stream(JobConfig("pretrain", 5, data=data), tokenizer, steps=5)
    assert "1 empty files" in capsys.readouterr().err
    for _ in range(40):
        next(stream)
    told = counts(stream.get_state())
    epochs = told["text/documents"] // 29
    assert epochs >= 2
    for kind in ("malformed", "empty", "undecodable", "cut"):
        assert epochs <= told[f"text/{kind}"] <= epochs + 1
        assert stream.metrics()[f"data/{kind}"] == told[f"text/{kind}"]
    assert 0 < stream.metrics()["data/fill"] <= 1
    assert "skipped (malformed)" in capsys.readouterr().err
    stream.close()


def test_job_stops_at_too_many_malformed_rows(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 80 + "{\n" * 20)
    data = DataConfig(paths=(str(tmp_path / "a.jsonl"),), sequence_length=16, batch_size=1)
    stream = make_stream(JobConfig("pretrain", 5, data=data), tokenizer, steps=5)
    with pytest.raises(ConfigError, match=r"malformed, data.bad_share is 0.01; .*a.jsonl at byte"):
        list(itertools.islice(stream, 100))
    stream.close()


# Chats.


def spans(example, tokenizer):
    """Texts that are predicted, one a stretch."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask, [0]])))
    parts = zip(edges[::2], edges[1::2], strict=True)
    return [tokenizer.decode(example.ids[start:stop]) for start, stop in parts]


def encoded(messages, tokenizer, thinking="keep", length=1000, **row):
    record = type("", (), {"row": {"messages": messages, **row}})
    record.problem, record.place, record.undecodable = "", "here", False
    return ChatEncoder(tokenizer, "messages", length, thinking)(record)


def test_assistants_turns_are_predicted_with_their_end(tokenizer):
    example = encoded(CHAT, tokenizer)
    first, second = spans(example, tokenizer)
    assert first == f"<think>\n1 and 1\n</think>\n\n2{EOS}"
    assert second == f"4{EOS}"
    assert tokenizer.decode(example.ids) == render_chat(CHAT, reply=False).rstrip("\n")


def test_prompt_is_encoded_as_it_will_be_when_sampling(tokenizer):
    example = encoded(CHAT[:3], tokenizer)
    prompt = tokenizer.encode(render_chat(CHAT[:2]))
    assert example.ids[: len(prompt)].tolist() == prompt


def test_thinking_is_kept_or_dropped_wherever_it_stands(tokenizer):
    apart = [CHAT[1], {"role": "assistant", "content": "2", "reasoning_content": "1 and 1"}]
    for messages in (CHAT[1:3], apart):
        assert spans(encoded(messages, tokenizer), tokenizer) == [
            f"<think>\n1 and 1\n</think>\n\n2{EOS}"
        ]
        assert spans(encoded(messages, tokenizer, "drop"), tokenizer) == [f"2{EOS}"]


def test_thinking_in_a_list_of_items_is_kept_or_dropped(tokenizer):
    whole = {"role": "assistant", "content": [{"type": "text", "text": CHAT[2]["content"]}]}
    answer = [{"type": "text", "text": "2"}]
    apart = {"role": "assistant", "content": answer, "reasoning_content": "1 and 1"}
    for message in (whole, apart):
        kept, dropped = (
            spans(encoded([CHAT[1], message], tokenizer, how), tokenizer)
            for how in ("keep", "drop")
        )
        assert kept == [f"<think>\n1 and 1\n</think>\n\n2{EOS}"]
        assert dropped == [f"2{EOS}"]


def test_tools_may_be_json_and_in_openais_form(tokenizer):
    tools = [{"name": "add", "description": "adds", "parameters": {}}]
    wrapped = [{"type": "function", "function": tools[0]}]
    plain = encoded(CHAT, tokenizer, tools=tools).ids.tolist()
    for given in (json.dumps(tools), wrapped, json.dumps(wrapped)):
        assert encoded(CHAT, tokenizer, tools=given).ids.tolist() == plain
    bare = encoded(CHAT, tokenizer).ids.tolist()
    for nothing in (None, "", "[]", "null"):
        assert encoded(CHAT, tokenizer, tools=nothing).ids.tolist() == bare


@pytest.mark.parametrize("tools", ["add", '["add"]', '{"name": "add"}', ["add"], {"name": "add"}])
def test_tools_that_are_no_list_of_objects(tokenizer, tools):
    assert encoded(CHAT, tokenizer, tools=tools).kind == "malformed"


def test_tools_and_calls_are_in_the_template(tokenizer):
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "tool_call_id": "1", "content": "2", "tool_calls": None},
        {"role": "assistant", "content": "2", "tool_calls": None},
    ]
    tools = [{"name": "add", "description": "adds", "parameters": {}}]
    example = encoded(messages, tokenizer, tools=tools)
    called, answer = spans(example, tokenizer)
    assert called.startswith('<tool_calls>\n{"name": "add"')
    assert answer == f"2{EOS}"
    assert f"{BOS}system tool_setting=tools" in tokenizer.decode(example.ids)


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ("hello", "malformed"),
        ([{"role": "robot", "content": "x"}], "malformed"),
        ([{"role": "user", "content": 3}], "malformed"),
        (["x"], "malformed"),
        (None, "malformed"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, CHAT[2]], "malformed"),
        ([CHAT[1], {"role": "assistant", "content": 3}], "malformed"),
        (CHAT[:2], "empty"),
        ([], "empty"),
        ([*CHAT, {"role": "assistant", "content": "a" * 2000}], "too_long"),
    ],
)
def test_chats_that_make_no_example(tokenizer, messages, kind):
    found = encoded(messages, tokenizer)
    assert isinstance(found, Skipped)
    assert found.kind == kind


# Tokenizers.


def test_words_are_not_merged_across_their_borders(tokenizer):
    for text in ("Document 12 says\n\n\tGrüße, 世界 🙂", " x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("Document 12 says 144.")]
    assert tokens == ["Document", " ", "1", "2", " says", " ", "1", "4", "4", "."]


def test_tokenizer_is_trained_by_its_command(tmp_path, capsys):
    path = write_jsonl(tmp_path, [{"body": text} for text in TEXTS])
    out = tmp_path / "tokenizer"
    assert train_main([str(out), str(path), "--field", "body", "--vocab-size", "265"]) == 0
    assert capsys.readouterr().out.startswith("265 ids to ")
    assert (out / "tokenizer.json").exists()
    assert train_main([str(out), str(tmp_path / "nothing")]) == 2
    assert "matches no file" in capsys.readouterr().err


def test_tokenizers_read_all_sources_in_turn(tmp_path):
    texts = write_jsonl(tmp_path, [{"text": text} for text in TEXTS])
    chats = write_jsonl(tmp_path, [{"messages": CHAT}] * 2, "chats.jsonl")
    mixture = (
        SourceConfig("texts", (str(texts),)),
        SourceConfig("chats", (str(chats),), kind="chat"),
    )
    found = list(sample_texts(DataConfig(mixture=mixture)))
    assert set(found) == {*TEXTS, render_chat(CHAT, reply=False), ""}
    assert found[1] == render_chat(CHAT, reply=False)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_half_a_character_trains_no_tokenizer(tmp_path, kind):
    rows = ["\ud800", "fine"]
    if kind == "chat":
        rows = [[{"role": "assistant", "content": row}] for row in rows]
    path = write_jsonl(tmp_path, [{"text": row} for row in rows])
    found = sample_texts(
        DataConfig(mixture=(SourceConfig("s", (str(path),), kind=kind, field="text"),))
    )
    first, second = sorted(found)
    assert first == ""
    assert "fine" in second
