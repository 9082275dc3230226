"""Which tensor of a checkpoint is which parameter: one table a layout, read in both directions.

A parameter is named by its path in the model's NNX state, joined with dots. Those of the layers
are stacked [super-blocks, layers of the run, ...], so layer l stands in super-block l // period.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np

from mmjax.config import LIGHTNING, SOFTMAX, ModelConfig
from mmjax.convert.errors import CheckpointError
from mmjax.convert.view import Index, View
from mmjax.model import pattern_runs

TensorLayout = Literal["hf", "hf-native"]
LAYOUTS: tuple[TensorLayout, ...] = get_args(TensorLayout)


class Rule(NamedTuple):
    """One row of a table.

    Attributes:
      param: The parameter, within its layer or within the model.
      key: The tensor; `{layer}` and `{expert}` are filled in, one tensor for each.
      axes: How the tensor's axes become the parameter's: "(h c k) d -> d h c k" splits the first
        axis into heads, the three of q, k, v and key dims, and moves the second to the front.
        Axes of the key come before these. Letters: see `_sizes`.
      part: Index on the tensor's axis p, which the parameter has not: w1 and w3 in one tensor.
    """

    param: str
    key: str
    axes: str
    part: int | None = None


_MODEL = (
    Rule("embed.embedding", "model.embed_tokens.weight", "v d -> v d"),
    Rule("norm.scale", "model.norm.weight", "d -> d"),
)
_HEAD = Rule("head.kernel", "lm_head.weight", "v d -> d v")
_LAYER = "model.layers.{layer}."
_NORMS = (
    Rule("attention_norm.scale", _LAYER + "input_layernorm.weight", "d -> d"),
    Rule("moe_norm.scale", _LAYER + "post_attention_layernorm.weight", "d -> d"),
)
_ATTENTION = {
    # Head-major: each head holds its q, k and v side by side. Thirds of the rows would be wrong.
    LIGHTNING: (
        Rule("attention.qkv", _LAYER + "self_attn.qkv_proj.weight", "(h c k) d -> d h c k"),
        Rule("attention.gate", _LAYER + "self_attn.output_gate.weight", "(h k) d -> d h k"),
        Rule("attention.norm", _LAYER + "self_attn.norm.weight", "(h k) -> h k"),
        Rule("attention.out", _LAYER + "self_attn.out_proj.weight", "d (h k) -> h k d"),
    ),
    SOFTMAX: (
        Rule("attention.q", _LAYER + "self_attn.q_proj.weight", "(h k) d -> d h k"),
        Rule("attention.k", _LAYER + "self_attn.k_proj.weight", "(g k) d -> d g k"),
        Rule("attention.v", _LAYER + "self_attn.v_proj.weight", "(g k) d -> d g k"),
        Rule("attention.out", _LAYER + "self_attn.o_proj.weight", "d (h k) -> h k d"),
    ),
}
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."
_MOE = {
    "hf": (
        Rule("moe.router", _LAYER + "block_sparse_moe.gate.weight", "e d -> d e"),
        Rule("moe.w1", _EXPERT + "w1.weight", "f d -> d f"),
        Rule("moe.w2", _EXPERT + "w2.weight", "d f -> f d"),
        Rule("moe.w3", _EXPERT + "w3.weight", "f d -> d f"),
    ),
    "hf-native": (
        Rule("moe.router", _LAYER + "mlp.gate.weight", "e d -> d e"),
        Rule("moe.w1", _LAYER + "mlp.experts.gate_up_proj", "e (p f) d -> e d f", part=0),
        Rule("moe.w3", _LAYER + "mlp.experts.gate_up_proj", "e (p f) d -> e d f", part=1),
        Rule("moe.w2", _LAYER + "mlp.experts.down_proj", "e d f -> e f d"),
    ),
}
_SHARED = (
    Rule("moe.shared.gate", _LAYER + "shared_mlp.gate_proj.weight", "f d -> d f"),
    Rule("moe.shared.up", _LAYER + "shared_mlp.up_proj.weight", "f d -> d f"),
    Rule("moe.shared.down", _LAYER + "shared_mlp.down_proj.weight", "d f -> f d"),
    Rule("moe.shared.coefficient", _LAYER + "coefficient.weight", "o d -> d o"),
)

_TOWER = "{tower}"
_VISION = (
    Rule("vision.class_embedding", _TOWER + "embeddings.class_embedding", "w -> w"),
    Rule("vision.patch", _TOWER + "embeddings.patch_embedding.weight", "w i y x -> y x i w"),
    Rule("vision.position", _TOWER + "embeddings.position_embedding.weight", "s w -> s w"),
    Rule("vision.pre_norm.scale", _TOWER + "pre_layrnorm.weight", "w -> w"),  # Their spelling.
    Rule("vision.pre_norm.bias", _TOWER + "pre_layrnorm.bias", "w -> w"),
    Rule("vision.linear_1.kernel", "{projector}linear_1.weight", "d w -> w d"),
    Rule("vision.linear_1.bias", "{projector}linear_1.bias", "d -> d"),
    Rule("vision.linear_2.kernel", "{projector}linear_2.weight", "a d -> d a"),
    Rule("vision.linear_2.bias", "{projector}linear_2.bias", "d -> d"),
    Rule("vision.newline", "{newline}", "d -> d"),
)
_TOWER_LAYER = _TOWER + "encoder.layers.{layer}."
_VISION_LAYER = (
    *(
        rule
        for param, key in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"))
        for rule in (
            Rule(f"vision.layers.{param}.scale", _TOWER_LAYER + key + ".weight", "w -> w"),
            Rule(f"vision.layers.{param}.bias", _TOWER_LAYER + key + ".bias", "w -> w"),
        )
    ),
    *(
        rule
        for param, key, weight, bias in (
            ("q", "self_attn.q_proj", "(n j) w -> w n j", "(n j) -> n j"),
            ("k", "self_attn.k_proj", "(n j) w -> w n j", "(n j) -> n j"),
            ("v", "self_attn.v_proj", "(n j) w -> w n j", "(n j) -> n j"),
            ("out", "self_attn.out_proj", "w (n j) -> n j w", "w -> w"),
            ("fc1", "mlp.fc1", "u w -> w u", "u -> u"),
            ("fc2", "mlp.fc2", "w u -> u w", "w -> w"),
        )
        for rule in (
            Rule(f"vision.layers.{param}.kernel", _TOWER_LAYER + key + ".weight", weight),
            Rule(f"vision.layers.{param}.bias", _TOWER_LAYER + key + ".bias", bias),
        )
    ),
)
# What stands before the keys of a model with a vision half: as released, and as transformers'
# port of it names them.
_PREFIXES = {
    "hf": {
        "model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "tower": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
        "newline": "image_newline",
    },
    "hf-native": {
        "model.": "model.language_model.",
        "lm_head.": "lm_head.",
        "tower": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "newline": "model.image_newline",
    },
}


def text_key(cfg: ModelConfig, layout: TensorLayout, key: str) -> str:
    """A text model's key as it stands in this model's folder."""
    if cfg.vision is None:
        return key
    start = next(start for start in ("model.", "lm_head.") if key.startswith(start))
    return _PREFIXES[layout][start] + key.removeprefix(start)


def _vision_sizes(cfg: ModelConfig) -> dict[str, int]:
    vision = cfg.vision
    if vision is None:
        return {}
    return {
        "w": vision.hidden_size,
        "u": vision.intermediate_size,
        "n": vision.num_heads,
        "j": vision.hidden_size // vision.num_heads,
        "y": vision.patch_size,
        "x": vision.patch_size,
        "i": 3,  # Red, green, blue.
        "s": 1 + vision.patches,
        "a": cfg.hidden_size,
    }


def _sizes(cfg: ModelConfig) -> dict[str, int]:
    return _vision_sizes(cfg) | {
        "v": cfg.vocab_size,
        "d": cfg.hidden_size,
        "h": cfg.num_heads,
        "g": cfg.num_kv_heads,
        "k": cfg.head_dim,
        "c": 3,  # q, k, v
        "e": cfg.num_experts,
        "f": cfg.intermediate_size,
        "p": 2,  # w1, w3
        "o": 1,
    }


class Piece(NamedTuple):
    """One tensor `key` and one place of one parameter that hold the same numbers.

    `place` indexes the parameter's stacked axes: super-block and layer of the run, for an expert's
    own tensor the expert too.
    """

    param: str
    place: tuple[int, ...]
    key: str
    view: View


class Table:
    """All pieces of one model in one layout.

    Args:
      cfg: The architecture.
      layout: "hf", as released, or "hf-native", the names of transformers' own port.

    Attributes:
      pieces: Every piece, in the order of the layers.
      tensors: Shape of every tensor, by key.

    Raises:
      CheckpointError: the layout has no names for a part of this model.
    """

    def __init__(self, cfg: ModelConfig, layout: TensorLayout) -> None:
        if layout == "hf-native" and cfg.shared_intermediate_size:
            raise CheckpointError(
                "layout hf-native",
                [
                    f"the model has a shared expert (shared_intermediate_size "
                    f"{cfg.shared_intermediate_size}), for which transformers' own model has no "
                    "place; use the layout hf or orbax"
                ],
            )
        self.layout = layout
        self.pieces = tuple(_pieces(cfg, layout))
        self.tensors = {piece.key: piece.view.shape for piece in self.pieces}
        self._of_param: dict[str, dict[tuple[int, ...], Piece]] = defaultdict(dict)
        self._of_key: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            self._of_param[piece.param][piece.place] = piece
            self._of_key[piece.key].append(piece)

    def of_param(self, param: str) -> dict[tuple[int, ...], Piece]:
        """The pieces that make up a parameter, by place."""
        return self._of_param[param]

    def of_key(self, key: str) -> list[Piece]:
        """The pieces that make up a tensor."""
        return self._of_key[key]

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, from the places that its pieces fill."""
        shapes = {}
        for param, pieces in self._of_param.items():
            last = list(pieces.values())[-1]
            shapes[param] = (*(i + 1 for i in last.place), *last.view.param_shape)
        return shapes

    def export(self, key: str, rows: range, read: Callable[[str, Index], np.ndarray]) -> np.ndarray:
        """Part of one tensor of the checkpoint.

        Args:
          key: The tensor.
          rows: Which places of its first axis (of heads, say, where heads and key dims share a
            dimension).
          read: Gives a slice of a parameter.

        Returns:
          These rows of the tensor, contiguous.
        """
        pieces = self._of_key[key]
        tensor: np.ndarray | None = None
        for piece in pieces:
            inside = [slice(None)] * len(piece.view.order)
            inside[piece.view.lead_axis] = slice(rows.start, rows.stop)
            value = read(piece.param, (*(slice(i, i + 1) for i in piece.place), *inside))
            value = value[(0,) * len(piece.place)]
            view = piece.view.cut(len(rows))
            if tensor is None:
                if (ready := view.whole(value)) is not None:
                    return ready
                tensor = np.empty(view.shape, value.dtype)
            view.write(tensor, value)
        assert tensor is not None
        return tensor


def _pieces(cfg: ModelConfig, layout: TensorLayout) -> Iterator[Piece]:
    sizes = _sizes(cfg)
    views: dict[Rule, View] = {}

    def piece(rule: Rule, param: str, place: tuple[int, ...], **key: int) -> Piece:
        view = views.setdefault(rule, View.of(rule.axes, sizes, rule.part))
        return Piece(param, place, text_key(cfg, layout, rule.key.format(**key)), view)

    def seen(rule: Rule, place: tuple[int, ...]) -> Piece:
        view = views.setdefault(rule, View.of(rule.axes, sizes))
        key = rule.key.format(**_PREFIXES[layout], layer=place[0] if place else 0)
        return Piece(rule.param, place, key, view)

    for rule in _MODEL if cfg.tie_embeddings else (*_MODEL, _HEAD):
        yield piece(rule, rule.param, ())
    for layer, (run, kind, place) in enumerate(_layer_places(cfg)):
        shared = _SHARED if cfg.shared_intermediate_size else ()
        for rule in (*_NORMS, *_ATTENTION[kind], *_MOE[layout], *shared):
            param = f"blocks.runs.{run}.{rule.param}"
            if "{expert}" not in rule.key:
                yield piece(rule, param, place, layer=layer)
                continue
            for expert in range(cfg.num_experts):
                yield piece(rule, param, (*place, expert), layer=layer, expert=expert)
    if cfg.vision is not None:
        yield from (seen(rule, ()) for rule in _VISION)
        for layer in range(cfg.vision.num_layers):
            yield from (seen(rule, (layer,)) for rule in _VISION_LAYER)


def _layer_places(cfg: ModelConfig) -> Iterator[tuple[int, str, tuple[int, int]]]:
    """Run, kind, and place [super-block, layer of the run] of each layer in order."""
    for super_block in range(cfg.num_layers // cfg.period):
        for run, (kind, count) in enumerate(pattern_runs(cfg)):
            for place in range(count):
                yield run, kind, (super_block, place)
