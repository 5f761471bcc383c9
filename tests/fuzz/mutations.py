"""Damaged data: values that no program expects, put into valid files, and bytes that were torn."""

import copy
import json

from hypothesis import strategies as st


NAMES = ["../x", "../../outside.safetensors", "/etc/hostname", "..\\x", "a\0b", "", ".", "..", "a" * 300, "\ud800", "NaN",
         "__proto__", "é\u202e", "model.safetensors", "-x", "x" * 64 + "-" + "0" * 16 + ".safetensors"]  # fmt: skip
NUMBERS = [0, -1, 1, 7, 2**31, 2**32 + 8, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308,
           float("nan"), float("inf"), -float("inf")]  # fmt: skip
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.sampled_from(NAMES),
    st.text(max_size=8),
)
values = st.one_of(
    leaves,
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=8,
    ),
)


def places_in(value, path=()):
    """Paths to all values in a JSON value, itself included."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places_in(child, (*path, key))


def at(value, path):
    """The value at a path."""
    for key in path:
        value = value[key]
    return value


@st.composite
def damaged_json(draw, valid):
    """A copy of a JSON value in which one to three places were replaced, removed, doubled, or taken from elsewhere."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places_in(value))))
        if not path:
            value = draw(values) if draw(st.integers(0, 9)) == 0 else value
            continue
        parent, key = at(value, path[:-1]), path[-1]
        action = draw(st.sampled_from(["replace", "replace", "number", "remove", "graft", "add"]))
        if action == "replace":
            parent[key] = draw(values)
        elif action == "number":
            parent[key] = draw(st.sampled_from(NUMBERS))
        elif action == "remove":
            del parent[key]
        elif action == "graft":
            parent[key] = copy.deepcopy(at(value, draw(st.sampled_from(list(places_in(value))))))
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(NAMES) | st.text(max_size=8))] = draw(values)
        else:
            parent.insert(draw(st.integers(0, len(parent))), draw(values))
    return value


@st.composite
def damaged_bytes(draw, valid: bytes):
    """A copy of some bytes, flipped, cut, lengthened or moved; at the front more often, where headers are."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        length = len(data)
        place = draw(st.integers(0, min(length, 300)) | st.integers(0, length))
        action = draw(st.sampled_from(["flip", "flip", "cut", "insert", "copy", "zeros", "length"]))
        if action == "flip" and place < length:
            data[place] ^= draw(st.integers(1, 255))
        elif action == "cut":
            del data[place : place + draw(st.integers(1, max(length, 1)))]
        elif action == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif action == "copy":
            start = draw(st.integers(0, length))
            data[place : place + 32] = data[start : start + 32]
        elif action == "zeros":
            data[place : place + 16] = bytes(len(data[place : place + 16]))
        elif action == "length":
            data[:8] = draw(st.sampled_from([0, 1, 2, length, length - 8, 2**31, 2**40, 2**63, 2**64 - 1])).to_bytes(
                8, "little"
            )
    return bytes(data)


@st.composite
def damaged_text(draw, valid):
    """The bytes of a JSON value after damage to its values, or to its text."""
    if draw(st.integers(0, 3)):
        return json.dumps(draw(damaged_json(valid))).encode()
    if draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe", b"", b"null"]))
    return draw(damaged_bytes(json.dumps(valid).encode()))


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@st.composite
def damaged_safetensors(draw, valid: bytes):
    """A safetensors file with a lying header, or torn bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(valid))
    header, body = split_safetensors(valid)
    header = draw(damaged_json(header))
    if isinstance(header, dict) and draw(st.booleans()):
        entries = [entry for entry in header.values() if isinstance(entry, dict) and "data_offsets" in entry]
        if entries:
            entry = draw(st.sampled_from(entries))
            entry["data_offsets"] = draw(
                st.lists(st.sampled_from([*NUMBERS[:12], len(body), len(body) + 8]), max_size=3)
            )
            if draw(st.booleans()):
                entry["shape"] = draw(st.lists(st.sampled_from(NUMBERS[:12]), max_size=4))
    text = json.dumps(header).encode()
    length = (
        len(text) if draw(st.integers(0, 4)) else draw(st.sampled_from([0, 8, len(text) - 1, len(text) + 1, 2**62]))
    )
    body = draw(damaged_bytes(body)) if body and draw(st.integers(0, 3)) == 0 else body
    return length.to_bytes(8, "little") + text + body
