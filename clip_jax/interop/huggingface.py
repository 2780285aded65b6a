"""Hugging Face directories: CLIPModel, SiglipModel, Siglip2Model, VisionTextDualEncoderModel.

config.json, model.safetensors, tokenizer and preprocessor files, as transformers' `AutoModel` and
`AutoProcessor` read and write them. Neither transformers nor torch is needed here, but for
`pytorch_model.bin` (torch) and `peer_embeddings` (both). Fixed-resolution SigLIP 2 checkpoints are
of class SiglipModel; Siglip2Model is NaFlex.
"""

import logging
from pathlib import Path

from clip_jax.config import UserError
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.interop.checks import checked
from clip_jax.interop.huggingface_config import model_config, read_model
from clip_jax.interop.huggingface_families import FAMILIES, family_of
from clip_jax.interop.huggingface_files import read_json, read_weights, write_json
from clip_jax.interop.huggingface_images import preprocessor_config
from clip_jax.interop.huggingface_peer import peer_embeddings
from clip_jax.interop.huggingface_tokenizer import write_tokenizer
from clip_jax.interop.huggingface_towers import join_in_proj, split_in_proj
from clip_jax.interop.table import read_table, write_table
from clip_jax.interop.tensors import write_safetensors
from clip_jax.interop.weights import PARTS, Weights, model_shapes

__all__ = ["peer_embeddings", "read", "read_tokenizer", "write"]

_log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")
# Indices that older versions saved with the weights: they hold no numbers of their own.
_BUFFERS = (r".*\.embeddings\.position_ids", r".*\.embeddings\.token_type_ids")


def read(path: Path) -> Weights:
    """The model in a directory. Raises UserError, in one line, for whatever is odd about it."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory with a config.json, as transformers saves it")
    file = path / "config.json"
    config, where = read_json(file), str(file)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        from clip_jax.interop import single_tower

        return single_tower.read(path)
    family = FAMILIES[model_type].of(config, where)
    tensors = read_weights(path)
    prefix = family.vision_prefix(tensors)
    tokenizer = read_tokenizer(path)
    model = read_model(family, config, where, path, tokenizer)
    if family.vision.has_head:
        tensors = split_in_proj(tensors, prefix, model.image.width)
    arrays = read_table(family.rows(model, prefix), tensors, model_shapes(model), ignored=_BUFFERS)
    extras = {} if prefix == family.prefix else {"huggingface": {"vision_prefix": prefix}}
    return checked(Weights(model=model, arrays=arrays, tokenizer=tokenizer, extras=extras), where)


def write(weights: Weights, directory: Path) -> None:
    """Files into an existing directory; UserError names what transformers cannot express."""
    if weights.parts != PARTS:
        from clip_jax.interop import single_tower

        single_tower.write(weights, directory)
        return
    model, tokenizer = weights.model, weights.tokenizer
    family = family_of(model)
    prefix = weights.extras.get("huggingface", {}).get("vision_prefix", family.prefix)
    config = model_config(family, model, tokenizer, weights.arrays)
    preprocessing = preprocessor_config(model.image, family.processor)
    tensors = write_table(family.rows(model, prefix), weights.arrays)
    if family.vision.has_head:
        tensors = join_in_proj(tensors, prefix, model.image.width)
    if tokenizer is not None:
        if tokenizer.rules.clean in ("whitespace", "canonicalize"):
            _log.warning(
                "transformers does not mend broken Unicode and HTML entities in captions, as this "
                "tokenizer does: such captions get other tokens there"
            )
        write_tokenizer(tokenizer, model.text, directory, family)
    write_json(directory / "preprocessor_config.json", preprocessing)
    write_json(directory / "config.json", config)
    write_safetensors(directory / "model.safetensors", tensors)


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer, where it has one."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return Tokenizer.load(directory)
