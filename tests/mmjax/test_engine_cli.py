"""`mmjax generate` on a small model folder."""

import argparse
import io
from collections import Counter

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mmjax
from mmjax import SamplingParams, cli
from mmjax.chat import render_chat
from mmjax.engine.cli import _Meter, load_to_serve
from mmjax.engine.results import Output
from tests.mmjax.engines import ONE_LAYER, byte_tokenizer, small_engine, small_model
from tests.mmjax.programs import random_model, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    mmjax.save(small_model(), path)
    byte_tokenizer().save(path)
    return str(path)


@pytest.fixture
def generate(folder, capsys, monkeypatch):
    """Runs the command, on the engine that is compiled; its exit code, stdout and stderr."""
    monkeypatch.setattr("mmjax.engine.cli.Engine", lambda *_, **__: small_engine())

    def run(*argv, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main(["generate", folder, "--temperature", "0", "--max-tokens", "8", *argv])
        return code, *capsys.readouterr()

    return run


def reference(text, **changes):
    """What a prompt is answered, alone."""
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0} | changes)
    return small_engine().generate([text], params)[0].text


def user(text):
    return {"role": "user", "content": text}


def test_one_prompt(generate):
    code, out, err = generate("--raw", "--prompt", "hello", "--stop", "never", "--min-p", "0.1")
    assert (code, out) == (0, f"--- hello\n{reference('hello')}\n")
    assert "8 tokens, the first after" in err


def test_int8_experts_are_asked_for(folder, monkeypatch):
    asked = {}

    def engine(*_, **options):
        asked.update(options)
        return small_engine()

    monkeypatch.setattr("mmjax.engine.cli.Engine", engine)
    argv = ["generate", folder, "--raw", "--prompt", "a", "--max-tokens", "1", "--int8-experts"]
    assert cli.main(argv) == 0
    assert asked["int8_experts"]


@pytest.fixture
def compilations():
    """Counts programs that JAX compiles and those that it finds compiled; puts its folder back."""
    found = Counter()
    listen = lambda event, **_: found.update([event.removeprefix("/jax/compilation_cache/")])  # noqa: E731
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_compiles_nothing(tmp_path, compilations, capsys):
    folder = tmp_path / "one layer"
    mmjax.save(random_model(small_config(**ONE_LAYER)), folder)
    byte_tokenizer().save(folder)
    argv = ["generate", str(folder), "--raw", "--prompt", "hello", "--max-tokens", "2"]
    argv += ["--compilation-cache", str(tmp_path / "new" / "compiled")]
    for hits, misses in ((False, True), (True, False)):
        compilations.clear()
        assert cli.main(argv) == 0
        told = (compilations["cache_hits"] > 0, compilations["cache_misses"] > 0)
        assert told == (hits, misses), compilations
    first, second = capsys.readouterr().out.split("--- hello\n")[1:]
    assert first == second


def test_a_file_of_prompts(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo and\u2028more\r\n")
    code, out, err = generate("--prompts-file", str(file), "--system", "be brief")
    system = {"role": "system", "content": "be brief"}
    answers = [
        f"--- {text}\n{reference(render_chat([system, user(text)]))}\n"
        for text in ("one", "two and\u2028more")
    ]
    assert (code, out) == (0, "".join(answers))
    assert "tokens, the first after" in err


def test_a_file_that_is_no_text(generate, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"one\n\xff")
    code, _, err = generate("--prompts-file", str(tmp_path / "prompts.txt"))
    assert code != 0
    assert "is not UTF-8 at byte 4; convert it" in err


def test_what_comes_at_one_time_is_counted_apart():
    meter = _Meter()
    three = Output("a", 0, [1, 2, 3], "", None, None, 1, 0)
    meter.watch([three, three])
    assert str(meter).startswith("6 tokens, the first after 0.00 s; ")
    meter.watch([three])
    assert str(meter).startswith("9 tokens, the first after 0.00 s, then ")


def test_chat_remembers_its_turns(generate):
    code, out, err = generate("--chat", stdin="hello\n\nagain\n")
    first = reference(render_chat([user("hello")]))
    messages = [user("hello"), {"role": "assistant", "content": first}, user("again")]
    assert (code, out) == (0, f"> {first}\n> > {reference(render_chat(messages))}\n> ")
    assert err.count("tokens, the first after") == 2


def test_a_mesh_takes_the_weights_as_they_are_served(folder):
    args = argparse.Namespace(path=folder, dtype=None, mesh="data=2,expert=2,model=2")
    model = load_to_serve(args)
    embedding = model.embed.embedding.get_value()
    wanted = NamedSharding(embedding.sharding.mesh, P("model", None))
    assert dict(wanted.mesh.shape) == {"data": 2, "context": 1, "expert": 2, "model": 2}
    assert embedding.sharding.is_equivalent_to(wanted, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no prompt: give --prompt TEXT, --prompts-file FILE or --chat"),
        (["--prompt", "x", "--chat"], "--chat takes its prompts from the terminal"),
        (["--prompt", "x", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["--prompt", "x" * 128], "exceed the engine's 128 tokens"),
        (["--prompts-file", "/nowhere"], "No such file"),
        (["--prompt", "x", "--mesh", "model:2"], "'model:2' is no AXIS=SIZE; write it as data=16"),
        (["--prompt", "x", "--mesh", "model=3"], "needs 3 devices, there are 8"),
        (
            ["--prompt", "x", "--compilation-cache", "/dev/null/compiled"],
            "--compilation-cache /dev/null/compiled cannot be written: [Errno 20] Not a directory",
        ),
    ],
)
def test_user_errors(generate, argv, message):
    code, _, err = generate(*argv)
    assert code == 2
    assert err.startswith("mmjax generate: error: ")
    assert message in err
