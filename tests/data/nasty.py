"""Captions that tokenizers stumble over."""

import tokenizers as hf
from hypothesis import strategies as st

NASTY = [
    "",
    " ",
    "a",
    "A photo of a cat",
    "  blanks \t and\nlines\r\n ",
    "it's I'LL DON'T we've 'S ''s",
    "\u2019s \u201cquoted\u201d \u2018single\u2019",
    "smile \U0001f600 family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "flag \U0001f3f3\ufe0f\u200d\U0001f308 thumb \U0001f44d\U0001f3fd",
    "\u6f22\u5b57\u3068\u304b\u306a",
    "\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0639\u0631\u0628\u064a",
    "\uff26\uff35\uff2c\uff2c\u3000\uff37\uff29\uff24\uff34\uff28 \uff76\uff9e",
    "&lt;b&gt; &amp;amp; &amp;amp;amp; &eacute; &#39; &#x27; &nbsp;x &not &EACUTE; &#0; &#xD800;",
    "<b>&amp;</b>\n&amp;",
    "<e&#769; &#65;&#778;",
    "nul\0byte \x01\x0b\x0c\x1b[31mred\x1b[0m\x1c\x1f\x7f\x85\x9f",
    "caf\u00c3\u00a9 \u00e2\u20ac\u2122 mojibake \u00c3\u00a0 l",
    "caf\u00e9 cafe\u0301 \ufb01sh \u00df \u0130 \u017f '\u017f \u0391\u03a3 \u03a3\u0391\u03a3",
    "\u0345 a\u0345b \u1fb3",
    "\u00b2\u00b3 \u2167 \u00bd 1234567890 12.5 \u0663",
    "\ufeffbom \u200bzero\u200dwidth \u2028line\u2029 \u00a0 \u202erevo",
    "snake_case __init__ #tag @user http://x.y/z?a=b&c=d",
    "</w> ## \u2581 \u2581\u2581x <0x41>",
    "!!!??...---***",
    "x" * 10_000,
    "a b " * 2_500,
    "\U0001f600" * 2_000,
    "word&amp; " * 1_100,
]
SPELLED_SPECIALS = ["a <|endoftext|> b", "[CLS] [SEP] [PAD]", "</s><pad><eos>", "<start_of_text>x"]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(NASTY[:-4]), max_size=3).map("".join),
    st.text(st.characters(max_codepoint=127), max_size=30),
    st.text(st.characters(min_codepoint=0x300, max_codepoint=0x36F), max_size=4).map(
        lambda marks: f"e{marks}'s"
    ),
    st.from_regex(r"(&[#x]{0,2}[a-zA-Z0-9]{1,6};? ?){1,4}", fullmatch=True),
)


def settled(text: str) -> bool:
    """Whether the tokenizers library and the regex module agree on what is a letter or a number.

    They know different versions of Unicode, and so differ on its newest scripts.
    """
    import regex  # comes with the peers

    for pattern in (r"\p{L}", r"\p{N}"):
        ours = hf.pre_tokenizers.Split(hf.Regex(pattern), "removed")
        for character in set(text):
            if bool(regex.match(pattern, character)) == bool(ours.pre_tokenize_str(character)):
                return False
    return True
