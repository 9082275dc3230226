"""What the preview shows, by its command and in parts."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from mmjax.config import ConfigError, ModelConfig
from tests.train.data.test_documents import CHAT, TEXTS, write_jsonl
from tests.train.test_resume import ROOT
from train.config import DataConfig, JobConfig, SourceConfig
from train.data.preview import preview
from train.data.tokenizer import train_tokenizer
from train.stages import StageConfig


def shown(data, workdir, width=100, stages=(), **options):
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, color_system="standard", width=width, highlight=False
    )
    model = ModelConfig.tiny(vocab_size=300)
    job = JobConfig("sft", 5, model=model, data=data, stages=stages)
    preview(job, workdir, console, **options)
    return out.getvalue()


def test_rows_are_shown_with_their_documents_and_what_is_predicted(tmp_path, capsys):
    chats = write_jsonl(tmp_path, [{"messages": CHAT}] * 3 + ["x"], "chats.jsonl")
    texts = write_jsonl(tmp_path, [{"text": text} for text in TEXTS])
    mixture = (
        SourceConfig("chats", (str(chats),), kind="chat"),
        SourceConfig("texts", (str(texts),)),
    )
    data = DataConfig(mixture=mixture, bad_share=1.0, sequence_length=256, batch_size=2)
    told = shown(data, tmp_path, rows=2, batches=3)
    assert "0: 25" in told
    assert "row 1: " in told
    assert "segment 2: " in told
    green, dim = "\x1b[32m", "\x1b[2m"
    assert f"{green}4<end_of_sentence>" in told
    assert f"{dim}<beginning_of_sentence>system ai_setting=assistant" in told
    assert f"{dim}Be brief." in told
    assert "3 batches: 6 rows of 256 tokens, 9" in told
    assert "malformed" in told
    assert "skipped (malformed)" in capsys.readouterr().err


def test_long_documents_are_shown_in_part(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 500)
    data = DataConfig(paths=(str(tmp_path / "a.txt"),), sequence_length=64, batch_size=1)
    told = shown(data, tmp_path, rows=1, batches=1, tokens=10)
    assert "... 54 tokens more" in told
    assert "cut" in told


def test_vocabulary_beyond_the_models_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 50)
    text = "".join(chr(n) * 9 for n in range(0x4E00, 0x4F00))
    train_tokenizer([text], 400).save(tmp_path / "tokenizer")
    data = DataConfig(
        paths=(str(tmp_path / "a.txt"),),
        sequence_length=64,
        batch_size=1,
        tokenizer=str(tmp_path / "tokenizer"),
    )
    assert "the tokenizer has 400 ids, model.vocab_size is 300" in shown(data, tmp_path)


def test_recall_is_shown_with_its_own_tokenizer(tmp_path):
    data = DataConfig("recall", tasks=("associative_recall",), sequence_length=96, batch_size=1)
    told = shown(data, tmp_path, rows=1, batches=1)
    assert "Memorize the following numbers." in told
    assert "recall" in told


def test_stages_are_shown_by_name(tmp_path):
    mixture = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 500)
        mixture.append(SourceConfig(name, (str(tmp_path / f"{name}.txt"),)))
    data = DataConfig(mixture=tuple(mixture), sequence_length=64, batch_size=1)
    stages = (
        StageConfig("short", steps=2, weights={"a": 1.0}),
        StageConfig("long", steps=2, sequence_length=128, weights={"b": 1.0}),
    )
    first, named = (
        shown(data, tmp_path, stages=stages, batches=2, stage=stage) for stage in ("", "long")
    )
    assert "stage 1 of 2, short" in first
    assert "rows of 64 tokens" in first
    assert "b b b" not in first
    assert "stage 2 of 2, long" in named
    assert "rows of 128 tokens" in named
    assert "a a a" not in named
    with pytest.raises(ConfigError, match="no stage 'far'; its stages: short, long"):
        shown(data, tmp_path, stages=stages, stage="far")


def test_pictures_have_no_preview(tmp_path):
    with pytest.raises(ConfigError, match="no preview"):
        shown(DataConfig("pictures"), tmp_path)


def test_command_shows_the_standard_library(tmp_path):
    train_tokenizer(TEXTS, 300).save(tmp_path)
    command = [sys.executable, "-m", "train.data.preview", "--config=configs/stdlib_cpu.py"]
    flags = [f"--config.data.tokenizer={tmp_path}", "--rows=1", "--batches=1"]
    done = subprocess.run(
        command + flags, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "row 0: 5" in done.stdout
    assert "stdlib" in done.stdout
