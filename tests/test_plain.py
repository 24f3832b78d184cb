"""Plain data, as returned by a round trip through JSON."""

from __future__ import annotations

import json
from collections import UserDict, deque
from pathlib import Path

import pytest

from hf_continual.plain import as_plain, is_plain


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (None, None),
        (True, True),
        ("text", "text"),
        ((1, 2.5), [1, 2.5]),
        ({1: ("a",)}, {"1": ["a"]}),
        (UserDict(a=deque([1])), {"a": [1]}),
        (b"raw", "b'raw'"),
        ({"at": [Path("x")]}, {"at": [repr(Path("x"))]}),
    ],
)
def test_as_plain(data, wanted):
    found = as_plain(data)
    assert found == wanted and is_plain(found) and json.loads(json.dumps(found)) == found


def test_what_stands_for_other_values_is_the_callers_choice():
    assert as_plain({"a": [{3}]}, other=len) == {"a": [1]}


@pytest.mark.parametrize("data", [(1,), {1: "a"}, {"a": {2}}, b"raw", Path("x")])
def test_is_plain_refuses_what_json_changes(data):
    assert not is_plain(data)
