"""Small two-tower models of ours, with tokenizers, for tests of import and export."""

import functools
import io
import json

import jax
import numpy as np
import sentencepiece
import tokenizers as hf
from flax import nnx

from clip_jax.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from clip_jax.data.token_models import encode_sentencepiece
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.weights import Weights, flatten
from clip_jax.models import CLIP

CAPTIONS = (
    "a photo of a cat",
    "two dogs are running on a beach at sunset",
    "red apples and pears on a wooden table",
    "the quick brown fox jumps over the lazy dog, 12 times!",
)
_SIZES = {"width": 32, "depth": 2, "num_heads": 2}
_SIGLIP_IMAGE = {
    "patch_bias": True,
    "class_token": False,
    "pre_norm": False,
    "pooling": "attention",
}
_HALF = (0.5, 0.5, 0.5)


@functools.cache
def small_weights(kind: str) -> Weights:
    """'clip', 'siglip', 'naflex' or 'bert': a model of that kind, every parameter random."""
    tokenizer = {
        "clip": lambda: Tokenizer.train(CAPTIONS, vocab_size=300, lowercase=True),
        "siglip": sentencepiece_tokenizer,
        "naflex": gemma_like_tokenizer,
        "bert": lambda: Tokenizer.train(CAPTIONS, 300, lowercase=True, kind="wordpiece"),
    }[kind]()
    image = _SIZES | {"image_size": 32, "patch_size": 8}
    text = _SIZES | {
        "vocab_size": tokenizer.vocab_size + 3,  # tables are often padded
        "context_length": 24,
        "eot_id": tokenizer.eot_id,
        "pad_id": tokenizer.pad_id,
    }
    model = {"embed_dim": 16}
    if kind in ("siglip", "naflex"):
        image |= _SIGLIP_IMAGE | {"mean": _HALF, "std": _HALF, "resize": "squash"}
        text |= {"causal": False, "pooling": "last", "activation": "gelu_tanh"}
        model = {
            "embed_dim": 32,
            "image_projection": "none",
            "text_projection": "linear_bias",
            "logit_scale_init": 10.0,
            "logit_bias_init": -10.0,
        }
    if kind == "naflex":
        image |= {"kind": "naflex", "max_num_patches": 20, "interpolation": "bilinear"}
    if kind == "bert":
        text |= {"kind": "bert", "pooling": "class_token", "pooler": True}
        text |= {"layer_norm_epsilon": 1e-12}
    config = ModelConfig(image=ImageTowerConfig(**image), text=TextTowerConfig(**text), **model)
    rng = np.random.default_rng(0)
    shapes = flatten(nnx.state(jax.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0)))))
    arrays = {
        path: np.asarray(
            0.1 * rng.standard_normal(leaf.shape, np.float32) + path.endswith("scale"), np.float32
        )
        for path, leaf in shapes.items()
    }
    return Weights(model=config, arrays=arrays, tokenizer=tokenizer)


def sentencepiece_tokenizer() -> Tokenizer:
    """As SigLIP's: T5's special tokens, the end of text pads."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        bos_id=-1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        minloglevel=3,
    )
    content = encode_sentencepiece(model.getvalue())
    rules = {"eot_id": 1, "pad_id": 1, "clean": "siglip", "lowercase": True}
    return Tokenizer(json.dumps({"model": content["model"] | {"clip_jax": rules}}))


def gemma_like_tokenizer() -> Tokenizer:
    """As Gemma's in SigLIP 2: BPE with bytes to fall back on, blanks as underlines."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = hf.Tokenizer(hf.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Lowercase(), hf.normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = hf.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return Tokenizer(tokenizer.to_str()).with_rules(pad_id=0)
