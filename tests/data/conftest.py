import io
import os
from pathlib import Path

import pytest
import sentencepiece
from data.tars import pairs, write_tar

from clip_jax.data.sources.webdataset import WebdatasetSource


@pytest.fixture(scope="session")
def quickstart_cache(tmp_path_factory) -> Path:
    """Where the emoji set is built: once for the session, or once for all with $CLIP_JAX_CACHE."""
    shared = os.environ.get("CLIP_JAX_CACHE")
    return Path(shared) if shared else tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="session")
def tar_sources(tmp_path_factory) -> dict[str, WebdatasetSource]:
    """Two sources of different sizes: 40 samples in two tars, and 11."""
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "large-0.tar", pairs(0, 25))
    write_tar(folder / "large-1.tar", pairs(25, 15))
    write_tar(folder / "small.tar", pairs(100, 11, prefix="t"))
    return {
        "large": WebdatasetSource(str(folder / "large-{0,1}.tar"), folder / "index"),
        "small": WebdatasetSource(str(folder / "small.tar"), folder / "index"),
    }


_SENTENCES = [
    "A photo of a cat on the mat",
    "The quick brown fox jumps over the lazy dog",
    "Ein kleiner Hund l\u00e4uft im Garten",
    "\u6f22\u5b57 \u3068 \u304b\u306a",
    "smile \U0001f600 and laugh",
    "numbers 12345 and 67890",
    "it's a dog's life, isn't it? <tag> & $5.00 (approx.)",
]


def _sentencepiece(path: Path, **options) -> Path:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20),
        model_writer=content,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture(scope="session")
def t5_model(tmp_path_factory) -> Path:
    """A `.model` with the options of SigLIP's (T5's, English C4): NFKC, dummy prefix, unigrams."""
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    return _sentencepiece(path, vocab_size=120, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="session")
def gemma_model(tmp_path_factory) -> Path:
    """A `.model` with the options of Gemma's: BPE over characters, then bytes; nothing changed."""
    return _sentencepiece(
        tmp_path_factory.mktemp("gemma") / "tokenizer.model",
        vocab_size=450,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mask>", "\n", "\n\n"],
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
    )
