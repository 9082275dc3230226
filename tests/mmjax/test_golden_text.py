"""Every golden text case: the outputs of the original code on the weights in its own files.

Each case runs twice: on the released folder, and on that folder after a round trip through
transformers' layout.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.convert import convert
from mmjax.convert.params import by_name
from mmjax.convert.table import Table
from mmjax.layers.lightning import decay_rates
from tests.mmjax.programs import decode, empty_cache, extend, forward

# Of the largest magnitude in the array. The runs that made the data agree with each other to 6e-6.
BOUND = 2e-4
SOURCES = ("released", "through hf-native")


def assert_near(actual, expected, bound=BOUND):
    actual = np.asarray(actual, np.float32)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= bound, f"off by {error:.3g} of the largest element, allowed {bound:.3g}"


def split_loss(out, ids):
    """(cross-entropy of the next token, load-balancing loss), as the original computes them."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), ids[:, 1:, None], -1)
    return -chosen.mean(), out.aux.load_balancing_loss


def pytest_generate_tests(metafunc):
    """Parametrizes with the runs that the case has."""
    for argument, attribute in (("run", "runs"), ("decode_run", "decodes")):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, getattr(metafunc.cls, attribute))


@nnx.jit
@nnx.value_and_grad
def gradient(model, ids):
    ce, aux = split_loss(forward(model, ids), ids)
    return ce + model.cfg.router_aux_loss_coef * aux


class Suite:
    """What every case has to do."""

    name: str
    runs: tuple[str, ...]  # full forwards
    decodes: tuple[str, ...]  # a prefill, then one token at a time
    paddings: tuple[str, ...] = ()

    @pytest.fixture(scope="class")
    @classmethod
    def golden_run(cls, golden):
        with np.load(golden / "text" / cls.name / "golden.npz") as data:
            return dict(data)

    @pytest.fixture(scope="class", params=SOURCES)
    @classmethod
    def folder(cls, request, golden, tmp_path_factory):
        released = golden / "text" / cls.name
        if request.param == "released":
            return released
        native = tmp_path_factory.mktemp("golden") / "native"
        convert(released, native, "hf-native")
        return native

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, folder):
        model = mmjax.load(folder, dtype="float32")
        # Foreign keys of config.json mean nothing to the model; without them both sources share
        # their compiled programs.
        model.cfg = dataclasses.replace(model.cfg, extra=())
        return model

    def test_decay_rates(self, model, golden_run):
        rates = decay_rates(model.cfg.num_heads, model.cfg.num_layers)
        np.testing.assert_allclose(rates, golden_run["slope_rates"], rtol=2e-7)

    def test_every_run_is_tested(self, golden_run):
        runs = {name.removesuffix(".input_ids") for name in golden_run if "input_ids" in name}
        assert runs == {*self.runs, *self.decodes, *self.paddings}

    def test_full_forward(self, model, golden_run, run):
        ids = jnp.asarray(golden_run[f"{run}.input_ids"])
        out = forward(model, ids)
        logits = out.logits
        if f"{run}.positions" in golden_run:
            logits = logits[:, golden_run[f"{run}.positions"]]
        assert logits.dtype == jnp.float32
        assert_near(logits, golden_run[f"{run}.logits"])
        ce, aux = split_loss(out, ids)
        total = ce + model.cfg.router_aux_loss_coef * aux
        for value, field in ((ce, "ce_loss"), (aux, "aux_loss"), (total, "loss")):
            np.testing.assert_allclose(value, golden_run[f"{run}.{field}"], rtol=1e-6)

    def test_layer_by_layer(self, model, golden_run):
        seen = forward(model, jnp.asarray(golden_run["short.input_ids"])).intermediates
        expected = golden_run["short.hidden_states"]
        assert seen.hidden_states.shape == expected.shape
        for actual, layer in zip(seen.hidden_states, expected, strict=True):
            assert_near(actual, layer)
        router = golden_run["short.router_logits"]
        for actual, layer in zip(seen.router_logits, router, strict=True):
            assert_near(actual.reshape(layer.shape), layer)

    def test_prefill_and_decode(self, model, golden_run, decode_run):
        run = decode_run
        ids, length = golden_run[f"{run}.input_ids"], int(golden_run[f"{run}.prefill_len"])
        # One capacity for all runs, so that they share the program of a step.
        logits, cache = extend(model, ids[:, :length], empty_cache(model, len(ids), 320))
        assert_near(logits[:, -1], golden_run[f"{run}.prefill_last_logits"])
        assert_near(cache.state, golden_run[f"{run}.prefill.lightning_state"])
        if f"{run}.prefill.softmax_k" in golden_run:
            assert_near(cache.keys[:, :, :length], golden_run[f"{run}.prefill.softmax_k"])
            assert_near(cache.values[:, :, :length], golden_run[f"{run}.prefill.softmax_v"])
        logits, cache = decode(model, ids[:, length:], cache)
        assert_near(logits, golden_run[f"{run}.decode_logits"])
        if f"{run}.final.lightning_state" in golden_run:
            assert_near(cache.state, golden_run[f"{run}.final.lightning_state"])
        np.testing.assert_array_equal(cache.length, [ids.shape[1]] * len(ids))


class TestHybrid8(Suite):
    """7 lightning layers and a softmax one; sequences over the original's block of 256."""

    name = "hybrid8"
    runs = ("short", "exact", "long")
    decodes = ("dec_a", "dec_b", "dec_c")


class TestPattern010(Suite):
    """No period; alphas and betas of their own; padding and gradients."""

    name = "pattern010"
    runs = ("short",)
    decodes = ("dec_a",)
    paddings = ("pad.right", "pad.left", "padlong.right")

    def test_right_padding(self, model, golden_run):
        ids = golden_run["pad.right.input_ids"]
        mask = golden_run["pad.right.attention_mask"].astype(np.int32)
        out = forward(model, ids, mask)
        real = mask != 0
        assert_near(np.asarray(out.logits)[real], golden_run["pad.right.logits"][real])
        assert_near(np.asarray(out.logits)[real], golden_run["pad.unpadded_logits"][real])
        aux = golden_run["pad.right.aux_loss"]
        np.testing.assert_allclose(out.aux.load_balancing_loss, aux, rtol=1e-6)

    def test_left_padding(self, model, golden_run):
        ids = golden_run["pad.left.input_ids"]
        mask = golden_run["pad.left.attention_mask"].astype(np.int32)
        logits = np.asarray(forward(model, ids, mask).logits)
        self.compare_rows(logits, mask, golden_run)

    def compare_rows(self, logits, mask, golden_run):
        """Real tokens of each row, wherever they stand, against the row run alone."""
        for row, real, alone in zip(
            logits, mask != 0, golden_run["pad.unpadded_logits"], strict=True
        ):
            assert_near(row[real], alone[: real.sum()])

    def test_right_padding_over_a_block(self, model, golden_run):
        ids = golden_run["padlong.right.input_ids"]
        mask = golden_run["padlong.right.attention_mask"].astype(np.int32)
        out = forward(model, ids, mask)
        places = golden_run["padlong.right.positions"]
        real = mask[:, places] != 0
        logits = np.asarray(out.logits)[:, places]
        assert_near(logits[real], golden_run["padlong.right.logits"][real])
        aux = golden_run["padlong.right.aux_loss"]
        np.testing.assert_allclose(out.aux.load_balancing_loss, aux, rtol=1e-6)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_prefill(self, model, golden_run, side):
        ids = golden_run[f"pad.{side}.input_ids"]
        mask = golden_run[f"pad.{side}.attention_mask"].astype(np.int32)
        logits, cache = extend(model, ids, empty_cache(model, len(ids), 320), mask)
        self.compare_rows(np.asarray(logits), mask, golden_run)
        np.testing.assert_array_equal(cache.length, golden_run["pad.lengths"])

    def test_prefill_in_chunks_and_decode_is_one_forward(self, model, golden_run):
        ids = golden_run["short.input_ids"]
        cache = empty_cache(model, len(ids), 320)
        logits, start = [], 0
        for size in (17, 1, 4, 1, 4):
            out, cache = extend(model, ids[:, start : start + size], cache)
            logits.append(out)
            start += size
        rest, _ = decode(model, ids[:, start:], cache)
        assert_near(jnp.concatenate([*logits, rest], 1), golden_run["short.logits"])

    def test_gradients(self, model, golden_run):
        loss, grads = gradient(model, jnp.asarray(golden_run["short.input_ids"]))
        np.testing.assert_allclose(loss, golden_run["grad.loss"], rtol=1e-6)
        table = Table(model.cfg, "hf")
        arrays = {name: np.asarray(v.get_value()) for name, v in by_name(grads).items()}
        released = {
            key: table.export(
                key,
                range(table.of_key(key)[0].view.lead),
                lambda param, index: arrays[param][index],
            )
            for key in table.tensors
        }
        assert set(released) == set(golden_run["grad.names"])
        norms = [
            np.linalg.norm(released[name].astype(np.float64)) for name in golden_run["grad.names"]
        ]
        np.testing.assert_allclose(norms, golden_run["grad.norms"], rtol=1e-5)
        full = [name for name in golden_run if name.startswith("grad.full.")]
        assert full
        for name in full:
            assert_near(released[name.removeprefix("grad.full.")], golden_run[name])


class TestSuperblocks16(Suite):
    """Two super-blocks, shards, and the release's dtypes: float32 routers, the rest bfloat16."""

    name = "superblocks16_bf16"
    runs = ("short", "long")
    decodes = ("dec_a",)

    @pytest.fixture(scope="class")
    @classmethod
    def native_dtype_model(cls, folder):
        model = mmjax.load(folder)
        model.cfg = dataclasses.replace(model.cfg, extra=())
        return model

    def test_dtypes(self, native_dtype_model):
        model = native_dtype_model
        assert (model.cfg.dtype, model.cfg.param_dtype) == ("bfloat16", "bfloat16")
        for name, variable in by_name(nnx.state(model)).items():
            expected = jnp.float32 if "router" in name else jnp.bfloat16
            assert variable.get_value().dtype == expected, name

    # The original code in bfloat16 is off from its own float32 by a relative rms of 0.030 with
    # float32 routers and 0.034 with bfloat16 ones. Most of it comes from the experts that flip
    # where two are close, which is luck: over 64 random rows of this length ours is off from its
    # own float32 by 0.036 +- 0.011, the original's figures in the middle of it. So one row is
    # allowed 0.034 and one and a half such deviations.
    BFLOAT16_BOUND = 0.05

    def test_bfloat16(self, native_dtype_model, golden_run):
        expected = golden_run["short.logits"]
        official = golden_run["short.bf16_gates_fp32.logits"]
        logits = forward(native_dtype_model, golden_run["short.input_ids"]).logits
        assert relative_rms(logits, expected) <= self.BFLOAT16_BOUND
        assert relative_rms(official, expected) == pytest.approx(0.030, abs=5e-4)

    def test_bfloat16_decode(self, native_dtype_model, golden_run):
        ids, length = golden_run["dec_a.input_ids"], int(golden_run["dec_a.prefill_len"])
        cache = empty_cache(native_dtype_model, 1, 320)
        _, cache = extend(native_dtype_model, ids[:, :length], cache)
        assert cache.state.dtype == jnp.float32
        logits, _ = decode(native_dtype_model, ids[:, length:], cache)
        assert relative_rms(logits, golden_run["dec_a.decode_logits"]) <= self.BFLOAT16_BOUND


def relative_rms(actual, expected):
    error = np.asarray(actual, np.float64) - expected
    return np.sqrt((error**2).mean() / (expected.astype(np.float64) ** 2).mean())
