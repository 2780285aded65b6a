"""Training of vocabularies on captions: byte-level BPE and WordPiece."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import tokenizers as hf

from clip_jax.config.errors import UserError
from clip_jax.data.cleaning import encodable
from clip_jax.data.clip_bpe import END, START, WORDS
from clip_jax.data.tokenizer_rules import PAD

Kind = Literal["bpe", "wordpiece"]

_NUM_BYTES = 256
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_ALPHABET = 1000  # characters at most, as in BERT's own trainer of the tokenizers library
_SMALLEST_WORDPIECE = 200  # 5 special tokens and some 50 characters, each as `x` and `##x`, twice


def train_vocabulary(
    captions: Iterable[str], *, kind: Kind, vocab_size: int, lowercase: bool
) -> str:
    """The content of a `tokenizer.json`. The same captions give the same one.

    Raises UserError if `vocab_size`, the most tokens there may be, is too small or if there are no
    captions.
    """
    smallest = _NUM_BYTES + 3 if kind == "bpe" else _SMALLEST_WORDPIECE
    if vocab_size < smallest:
        what = f"{_NUM_BYTES} bytes and 3" if kind == "bpe" else "characters and 5"
        raise UserError(
            f"vocab_size {vocab_size} is below {smallest}: {what} special tokens; raise "
            "model.text.vocab_size"
        )
    cleaned = [encodable(caption) for caption in captions]
    if not cleaned:
        raise UserError("no captions to train a tokenizer on; add a training source")
    train = _train_bpe if kind == "bpe" else _train_wordpiece
    return str(train(cleaned, vocab_size, lowercase).to_str())


def _train_bpe(captions: list[str], vocab_size: int, lowercase: bool) -> hf.Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016)."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    steps: list[hf.normalizers.Normalizer] = [hf.normalizers.NFC()]
    if lowercase:
        steps.append(hf.normalizers.Lowercase())
    tokenizer.normalizer = hf.normalizers.Sequence(steps)
    # A blank before every word, at the start of a text and after a bracket too, makes it one
    # word wherever it stands. (CLIP marks the ends of words, which takes 256 tokens more.)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(WORDS), behavior="removed", invert=True),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = _template(tokenizer, START, END)
    return tokenizer


def _train_wordpiece(captions: list[str], vocab_size: int, lowercase: bool) -> hf.Tokenizer:
    """WordPiece as in BERT (Devlin et al. 2019, section 3): rows are `[CLS] text [SEP]`."""
    # A character takes two tokens, `x` and `##x`: half the vocabulary is left for words.
    most = min(_BERT_ALPHABET, (vocab_size - len(_BERT_SPECIALS)) // 4)
    tokenizer = _wordpiece(hf.models.WordPiece(unk_token="[UNK]"), lowercase)
    alphabet = _common_characters(tokenizer.normalizer, captions, most)
    # The trainer numbers pieces like `##x` in the order of a hash table, other ones every time: so
    # it gets them as special tokens, which come first, and a fresh model takes the vocabulary.
    inner = [f"##{character}" for character in alphabet]
    trainer = hf.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_BERT_SPECIALS, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    vocab = tokenizer.get_vocab()
    tokenizer = _wordpiece(hf.models.WordPiece(vocab, unk_token="[UNK]"), lowercase)
    tokenizer.add_special_tokens(list(_BERT_SPECIALS))
    tokenizer.post_processor = _template(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def _wordpiece(model: hf.models.WordPiece, lowercase: bool) -> hf.Tokenizer:
    tokenizer = hf.Tokenizer(model)
    tokenizer.normalizer = hf.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    return tokenizer


def _common_characters(
    normalizer: hf.normalizers.Normalizer, captions: list[str], most: int
) -> list[str]:
    """The most frequent characters, in the order of Unicode; of equally frequent ones the first."""
    counts = Counter[str]()
    for caption in captions:
        counts.update(normalizer.normalize_str(caption))
    counts.pop(" ", None)  # the only blank that the normalizer leaves
    common = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(common[:most])


def _template(tokenizer: hf.Tokenizer, start: str, end: str) -> hf.processors.PostProcessor:
    return hf.processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
