"""M1's chat template with tools, and replies taken apart in whatever pieces they come."""

import itertools
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mmjax.chat import ReplyParser, render_chat
from mmjax.tokenizer import BOS, EOS, Tokenizer

ADD = {"name": "add", "description": "a + b", "parameters": {"type": "object", "properties": {}}}


def call(identifier, arguments='{"a": 1, "b": 2}', name="add"):
    function = {"name": name, "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def test_tools_are_described_as_m1s_template_does():
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": " Be kind."}]},
    ]
    assert render_chat(messages, tools=[ADD], document_start="<begin_of_document>") == (
        "<begin_of_document>"
        f"{BOS}system ai_setting=assistant\nBe brief. Be kind.{EOS}\n"
        f"{BOS}system tool_setting=tools\nYou are provided with these tools:\n<tools>\n"
        '{"name": "add", "description": "a + b", "parameters": '
        '{"type": "object", "properties": {}}}\n'
        "</tools>\n\nIf you need to call tools, please respond with <tool_calls></tool_calls> XML "
        "tags, and provide tool-name and json-object of arguments, following the format below:\n"
        '<tool_calls>\n{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n'
        f"</tool_calls>{EOS}\n"
        f"{BOS}user name=user\n1+2?{EOS}\n"
        f"{BOS}ai name=assistant\n"
    )


def test_calls_and_results():
    messages = [
        {"role": "user", "content": "1+2 and 3+4?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("x"), call("y")]},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
        {"role": "tool", "content": [{"type": "text", "text": "7", "name": "sum"}]},
        {"role": "assistant", "content": None, "tool_calls": [call("z", "{}")]},
        {"role": "tool", "name": "plus", "content": "0"},
    ]
    line = '{"name": "add", "arguments": {"a": 1, "b": 2}}\n'
    assert render_chat(messages, reply=False) == (
        f"{BOS}user name=user\n1+2 and 3+4?{EOS}\n"
        f"{BOS}ai name=assistant\nLet me see.\n<tool_calls>\n{line}{line}</tool_calls>{EOS}\n"
        f"{BOS}tool name=tools\ntool name: add\ntool result: 3\n\n"
        f"tool name: sum\ntool result: 7\n\n{EOS}\n"
        f'{BOS}ai name=assistant\n<tool_calls>\n{{"name": "add", "arguments": {{}}}}\n'
        f"</tool_calls>{EOS}\n"
        f"{BOS}tool name=tools\ntool name: plus\ntool result: 0\n\n{EOS}\n"
    )


def test_a_written_call_is_the_call_that_is_read():
    arguments = '{"text": "</tool_calls> \\"{\\\\ é", "n": [1, {}]}'
    text = render_chat([{"role": "assistant", "tool_calls": [call("x", arguments)]}], reply=False)
    (piece,) = parse([text.removeprefix(f"{BOS}ai name=assistant\n").removesuffix(f"{EOS}\n")])
    assert piece[:2] == ("tool_call", "add")
    assert json.loads(piece[2]) == json.loads(arguments)


def test_arguments_may_be_an_object():
    given = {"text": "it's é", "all": True, "none": None}
    text = render_chat([{"role": "assistant", "tool_calls": [call("x", given)]}], reply=False)
    assert '"arguments": {"text": "it\'s é", "all": true, "none": null}}\n' in text


@pytest.mark.parametrize("given", ["{'a': 1}", "", "[1]", '{"a": NaN}', "[" * 100_000, [1], None])
def test_arguments_that_are_no_object(given):
    with pytest.raises(ValueError, match="a call's arguments"):
        render_chat([{"role": "assistant", "tool_calls": [call("x", given)]}])


def test_a_result_of_an_unknown_tool():
    with pytest.raises(ValueError, match="tool_call_id 'x' is no earlier call's"):
        render_chat([{"role": "tool", "tool_call_id": "x", "content": "3"}])


def parse(chunks, tools=True):
    """The pieces of a reply as (kind, name, text), neighbours of a kind joined."""
    parser = ReplyParser(tools=tools)
    pieces = list(itertools.chain(*map(parser.feed, chunks), parser.finish()))
    assert all(piece.text for piece in pieces)
    out = []
    for piece in pieces:
        if out and piece.kind == out[-1][0] != "tool_call":
            out[-1] = (piece.kind, "", out[-1][2] + piece.text)
        else:
            out.append((piece.kind, piece.name, piece.text))
    return out


def thinking(text):
    return ("thinking", "", text)


def said(text):
    return ("text", "", text)


CALL = '{"name": "add", "arguments": {"a": 1}}'
CALLED = ("tool_call", "add", '{"a": 1}')
NESTED = '{"name": "f", "arguments": {"s": "}</tool_calls>\\"", "d": {"e": [{}]}}}'
REPLIES = {
    "": [],
    "  Hello.\n": [said("  Hello.\n")],
    "<": [said("<")],
    "<thin air": [said("<thin air")],
    "a </think> b": [said("a </think> b")],
    "<think>\nHm.\n\nYes.\n</think>\n\nAnswer </think>": [
        thinking("Hm.\n\nYes."),
        said("Answer </think>"),
    ],
    "\n<think>Hm</think>": [thinking("Hm")],
    "<think>\n\n</think>\n7": [said("7")],
    "<think>\nnot closed </thin \n": [thinking("not closed </thin \n")],
    f"<think>\nx\n</think>\n<tool_calls>\n{CALL}\n{CALL}\n</tool_calls>": [
        thinking("x"),
        CALLED,
        CALLED,
    ],
    f"See: \n<tool_calls>{CALL}</tool_calls>\n Then. ": [said("See:"), CALLED, said("Then. ")],
    f"<tool_calls>\n{NESTED}\n</tool_calls>": [
        ("tool_call", "f", '{"s": "}</tool_calls>\\"", "d": {"e": [{}]}}')
    ],
    '<tool_calls>{"name": "now"}</tool_calls>': [("tool_call", "now", "{}")],
    # A reply cut short: what is whole counts, the rest is text.
    f"<tool_calls>\n{CALL}\n": [CALLED],
    f"<tool_calls>\n{CALL}\n{CALL[:9]}": [CALLED, said("\n" + CALL[:9])],
    f"a\n<tool_calls>\n{CALL[:-1]}": [said(f"a\n<tool_calls>\n{CALL[:-1]}")],
    "<tool_calls>": [said("<tool_calls>")],
    "x <tool_cal": [said("x <tool_cal")],
    # No JSON: a number that no float holds.
    '<tool_calls>{"name": "f", "arguments": {"x": 1e999}}</tool_calls>': [
        said('<tool_calls>{"name": "f", "arguments": {"x": 1e999}}</tool_calls>')
    ],
}
MALFORMED = [
    "",
    "add(1, 2)",
    f"[{CALL}]",
    '{"name": "add", "arguments": [1]}',
    '{"name": "add", "arguments": "{}"}',
    '{"name": 3, "arguments": {}}',
    '{"name": "", "arguments": {}}',
    '{"arguments": {}}',
    '{"name": "add", "arguments": {"a": NaN}}',
    '{"name": "add", "arguments": {"a": "\\ud800"}}',
    '{"name": "add", "arguments": {a: 1}}',
    '{"name": "add", "arguments": {}, "more": 1}',
]
for block in MALFORMED:
    REPLIES[f"No: \n<tool_calls>\n{block}\n</tool_calls> end"] = [
        said(f"No: \n<tool_calls>\n{block}\n</tool_calls> end")
    ]
    REPLIES[f"<tool_calls>{block}</tool_calls><tool_calls>{CALL}</tool_calls>"] = [
        said(f"<tool_calls>{block}</tool_calls>"),
        CALLED,
    ]


@pytest.mark.parametrize("text", REPLIES, ids=range(len(REPLIES)))
def test_replies_are_taken_apart_however_they_are_cut(text):
    assert parse([text]) == REPLIES[text]
    assert parse(text) == REPLIES[text]
    rng = random.Random(text)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), k=min(len(text), rng.randint(1, 6))))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert parse(chunks) == REPLIES[text]


def test_arguments_too_deep_to_read_are_text():
    text = '<tool_calls>{"name": "add", "arguments": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001
    assert parse([text]) == [said(text)]


def test_calls_are_text_where_no_tools_are_offered():
    text = f"<think>\nx\n</think>\n<tool_calls>\n{CALL}\n</tool_calls>"
    assert parse(text, tools=False) == [thinking("x"), said(text.partition("</think>\n")[2])]


def test_a_call_is_told_as_soon_as_it_is_whole():
    parser = ReplyParser(tools=True)
    assert parser.feed(f"<tool_calls>\n{CALL[:-1]}") == []
    assert [p.name for p in parser.feed("}\n")] == ["add"]


def byte_level(added=()):
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, *added])
    return Tokenizer(backend)


def alphabet():
    return {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def test_token_bytes():
    tokenizer = byte_level(["<begin of sentence>", "Ω"])
    text = "héllo €\n<end_of_sentence>"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert len(tokenizer.encode("€")) == 3
    for added in ("<begin of sentence>", "Ω"):
        (token,) = tokenizer.encode(added)
        assert tokenizer.token_bytes(token) == added.encode()
    assert tokenizer.token_bytes(100_000) == b""


def test_token_bytes_of_another_kind_of_tokenizer():
    backend = tokenizers.Tokenizer(models.WordLevel({EOS: 0, "hé": 1}, unk_token=EOS))
    assert Tokenizer(backend).token_bytes(1) == "hé".encode()


def test_document_start_is_there_if_the_vocabulary_has_it():
    assert byte_level().document_start == ""
    assert byte_level(["<begin_of_document>"]).document_start == "<begin_of_document>"
