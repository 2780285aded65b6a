"""What happens to a caption before its tokenizer sees it, as the peers do it."""

import html
import re
import string
from typing import Literal

Cleaning = Literal["none", "whitespace", "canonicalize", "siglip"]

# ASCII in which ftfy and the HTML parser have nothing to find: no control characters but blanks
# (ftfy drops them), no entities (they start with an ampersand).
_PLAIN = re.compile(r"[\t\n\r -%'-~]*")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, cleaning: Cleaning, *, lowercase: bool) -> str:
    """Return the caption as its tokenizer takes it.

    'whitespace': mend broken Unicode (ftfy), resolve HTML entities twice, collapse blanks: with
    `lowercase`, what OpenAI's CLIP and open_clip do ('lower' there). 'canonicalize': the same with
    underscores made blanks and ASCII punctuation taken out, always lower case (open_clip's SigLIP).
    'siglip': punctuation taken out and blanks collapsed (transformers' `SiglipTokenizer`). 'none':
    nothing but lower case, letter by letter: a capital sigma never becomes a final one, as in
    transformers' `Siglip2Tokenizer`.
    """
    if cleaning == "none":
        return text.replace("\u03a3", "\u03c3").lower() if lowercase else text
    if cleaning == "siglip":
        text = text.lower() if lowercase else text
        return " ".join(text.translate(_NO_PUNCTUATION).split())
    if not _PLAIN.fullmatch(text):
        text = _mended(text)
    if cleaning == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
        return " ".join(text.split())
    text = " ".join(text.split())
    return text.lower() if lowercase else text


def encodable(text: str) -> str:
    """JSON can hold half a surrogate pair, which no UTF-8 can: it becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _mended(text: str) -> str:
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))
