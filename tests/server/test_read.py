"""Half of a surrogate pair in a reply becomes U+FFFD, so that what is read can be written."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from abliterator.server import objects
from abliterator.server._read import without_surrogates

anything = st.text(st.characters() | st.characters(categories=["Cs"]))


@given(anything)
@example("\ud83d\ude00 \ud83d")
def test_half_a_character_in_a_reply_is_mended(text):
    for escaped in (True, False):
        (value,) = objects(json.dumps({"pairs": [{"target": text, text: 1}]}, ensure_ascii=escaped))
        json.dumps(value, ensure_ascii=False).encode()
    try:
        whole = text.encode()
    except UnicodeEncodeError:
        assert "\ufffd" in without_surrogates(text) or "\U0001f600" in without_surrogates(text)
    else:
        assert without_surrogates(text).encode() == whole
