"""Files that strangers might have made of ours: by chance, or by knowing the format."""

import ast
import io
import json
import pickle
import re
import struct
import zipfile

import numpy as np

# Longer than JSON's writer takes; they are put in afterwards.
_LATER = {
    '"@digits@"': "9" * 5000,
    '"@deep@"': "[" * 50_000 + "]" * 50_000,
    '"@deep object@"': '{"a":' * 5000 + "1" + "}" * 5000,
}
_NUMBERS = [0, 1, -1, 2, 64, 2**16, 2**31 - 1, 2**31, 2**63, 2**64, 10**9, -(10**12)]
_NUMBERS += [0.5, -0.0, 5e-324, 1e-30, 1e30, 1e308, float("nan"), float("inf")]
_TEXTS = ["", "x", "\0", "\ud800", "a\nb", "x" * 100_000, "../../x", "/dev/zero", "1"]
_TEXTS += ["nan", "$\\frac$", "predict_log_proba", "head_.kernel", "float8_e4m3fn"]
_TEXTS += ["<U100000000", "|O", "classes_", "minibatch", "full", "float64", "Tables"]
_OTHERS = [None, True, False, [], {}, [[]], [None], {"a": 1}, {"tuple": 3}, [0] * 1000]
_OTHERS += [{"array": ["a", "b"], "dtype": "<U1"}, {"dict": [[[], 1]]}, {"dict": [[1]]}]
ODD = [*_NUMBERS, *_TEXTS, *_OTHERS, *(name.strip('"') for name in _LATER)]
KEYS = ["predict_log_proba", "dtype", "head", "mesh", "__class__", "__sklearn_tags__"]
KEYS += ["", "\ud800", "coef_", "x" * 10_000, "checkpoint_dir", "kind", "table"]
_CELLS = [b"", b'"', b'"a', b"nan", b"inf", b"1e999", b"9" * 5000, b"-", b"\0", b"\r"]
_CELLS += [b"a,b", b"x" * 100_000, b"\xff\xfe", b"\xed\xa0\x80", "é東".encode(), b"#"]
_CELLS += [b"qid:1", b"-1:2", b"99999999999:1", b"10000000:1", b"1:1 1:1", b"0x10"]
_CELLS += [b"2026-11-29", b"true", b"sep=;\n", b"\n\n", b"{}", b"[1]", b'{"a": [1]}']
_CELLS += [b"-0", b"1_000", b"1e-400", b"2" * 19, b"-9223372036854775809", b"1.0"]
_DESCRIPTIONS = ["<f4", "<f2", ">i2", "|O", "<U100000000", "|V2", "|V0", "<M8[D]"]
_DESCRIPTIONS += ["<c16", "|S5", "|S0", "|b1", "<f16", "|u1", "<u8", "junk", 3, None]
_DESCRIPTIONS += [[("a", "<f8")], [("a", "|O")], ("<f8", (2,)), "<U1", "<i4", "<m8[s]"]
_SHAPES = [(), (0,), (1,), (-1,), (10**9, 10**9), (2**31,), (2**62, 4), (32, 4, 1, 1)]
_SHAPES += [(32, -4), (True,), ("x",), 5, None, (1.5,), (0, 10**9), (4, 32), (128,)]
_DTYPES = ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "U8", "X", "C64"]


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def blind(data, rng):
    """Changes bytes without knowing what they are."""
    data = bytearray(data)
    size = len(data)
    start, end = sorted(rng.integers(0, size + 1, 2).tolist())
    match rng.integers(8):
        case 0 | 1:
            for place in rng.integers(0, max(size, 1), rng.integers(1, 9)) * (size > 0):
                data[place : place + 1] = [
                    (data or b"\0")[place] ^ 1 << rng.integers(8)
                ]
        case 2:
            del data[start:]
        case 3:
            del data[start:end]
        case 4:
            data[start:start] = data[start:end] * int(rng.integers(1, 4))
        case 5:
            middle = (start + end) // 2
            data[start:end] = data[middle:end] + data[start:middle]
        case 6:
            data[start:end] = rng.bytes(end - start)
        case 7:
            data += rng.bytes(int(rng.integers(1, 200)))
    return bytes(data)


def dump(document):
    """JSON, with what Python does not write."""
    text = json.dumps(document)
    for mark, value in _LATER.items():
        text = text.replace(mark, value)
    return text.encode()


def _places(value):
    """Yields each container of a document with its keys."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys:
            yield value, key
            yield from _places(value[key])


def document(value, rng):
    """Changes one place of a JSON document, which may be its root."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return pick(rng, ODD)
    container, key = pick(rng, places)
    match rng.integers(10):
        case 0:
            del container[key]
        case 1:
            if isinstance(container, dict):
                container[pick(rng, KEYS)] = pick(rng, [*ODD, container[key]])
            else:
                container.extend([container[key]] * int(rng.integers(1, 50)))
        case 2:
            container[key] = pick(rng, places)[0]
            try:
                json.dumps(value)
            except ValueError:  # It holds itself.
                container[key] = None
        case _:
            container[key] = pick(rng, ODD)
    return value


def json_text(data, rng):
    """Changes a JSON text, or one line of several."""
    try:
        return dump(document(json.loads(data), rng))
    except ValueError:
        lines = data.splitlines()
        place = int(rng.integers(len(lines)))
        lines[place] = dump(document(json.loads(lines[place]), rng))
        return b"\n".join(lines) + b"\n"


def cells(data, rng):
    """Replaces a word of a text, or repeats it."""
    words = re.split(rb"([,;\t :\n])", data)
    for _ in range(rng.integers(1, 3)):
        place = int(rng.integers(len(words)))
        words[place] = pick(rng, [*_CELLS, words[place] * 2, words[0], b",", b"\n"])
    return b"".join(words)


def utf16(data, rng):
    text = cells(data.decode("utf-16").encode(), rng).decode(errors="replace")
    return text.encode("utf-16")


def footer(data, rng):
    """Changes the footer of a Parquet or an Arrow file, which nothing guards."""
    mark = 4 if data.endswith(b"PAR1") else 6
    (size,) = struct.unpack("<i", data[-mark - 4 : -mark])
    start = len(data) - mark - 4 - size
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(start, len(data) - mark))
        changed[place] = pick(rng, [0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
    return bytes(changed)


def safetensors(data, rng):
    """Changes the header of a model's file, or what it says of its tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    told = json.loads(header["__metadata__"]["jaxsoft"])
    names = [name for name in header if name != "__metadata__"]
    match rng.integers(8):
        case 0:
            tensor = header[pick(rng, names)]
            key = pick(rng, ["dtype", "shape", "data_offsets"])
            tensor[key] = pick(rng, _DTYPES) if key == "dtype" else tensor[key]
            if key != "dtype":
                tensor[key][rng.integers(len(tensor[key]))] = pick(rng, _NUMBERS)
        case 1:
            first, second = pick(rng, names), pick(rng, names)
            header[first], header[second] = header[second], header[first]
        case 2:
            header[pick(rng, [*KEYS, "n_iter_"])] = header.pop(pick(rng, names))
        case _:
            for _ in range(rng.integers(1, 3)):
                told = document(told, rng) if isinstance(told, dict) else told
    header["__metadata__"]["jaxsoft"] = dump(told).decode()
    text = json.dumps(header).encode()
    body = data[8 + size :]
    if rng.random() < 0.15 and body:
        values = np.frombuffer(body[: len(body) // 4 * 4], "<f4").copy()
        values[rng.integers(len(values))] = pick(rng, [np.nan, np.inf, 3e38, -1e30])
        body = values.tobytes() + body[len(values) * 4 :]
    return struct.pack("<Q", len(text)) + text + body


def npy(data, rng):
    """Changes what an array declares of itself."""
    size = struct.unpack("<H", data[8:10])[0]
    header = ast.literal_eval(data[10 : 10 + size].decode())
    match rng.integers(5):
        case 0 | 1:
            header["descr"] = pick(rng, _DESCRIPTIONS)
        case 2 | 3:
            header["shape"] = pick(rng, _SHAPES)
        case 4:
            header[pick(rng, ["fortran_order", "more"])] = pick(rng, [True, 1, "x"])
    text = repr(header).encode()
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + data[10 + size :]


class _Folder:
    """Would make a folder where a pickle of it is loaded."""

    def __reduce__(self):
        import os

        return os.mkdir, ("made by a pickle",)


def npz(data, rng):
    """Changes an array of an archive, whose checksums are right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(rng, list(members))
    choice = rng.integers(7)
    if choice < 2:
        members[name] = npy(members[name], rng)
    elif choice == 2:
        members[name] = blind(members[name], rng)
    elif choice == 3:
        members[pick(rng, [*KEYS, *members])] = members.pop(name)
    else:
        array = np.load(io.BytesIO(members[name]), allow_pickle=True)
        flat = array.reshape(-1).copy()
        place = rng.integers(max(flat.size, 1))
        if flat.dtype == object:
            flat[place] = pick(rng, [_Folder(), b"x", [1], {}, None, 2**70, "\ud800"])
        elif flat.dtype.kind in "iu":
            info = np.iinfo(flat.dtype)
            flat[place] = pick(rng, [-1, info.min, info.max, 3, 31, 32, 33, 10**6])
        elif flat.dtype.kind == "f":
            flat[place] = pick(rng, [np.nan, np.inf, -1e300, 1e39, 0])
        else:
            flat = flat.astype(pick(rng, ["S9", "U9", object]))
            odd = pick(rng, ["csc", "dia", "\xff", "lil", ""])
            flat[place] = odd.encode() if flat.dtype.kind == "S" else odd
        array = flat.reshape(array.shape)
        if rng.random() < 0.2:
            array = pick(rng, [array[:-1] if array.ndim else array, array[None]])
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        members[name] = file.getvalue()
    made = io.BytesIO()
    packing = pick(rng, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(made, "w", packing) as archive:
        for name, value in members.items():
            archive.writestr(name.encode(errors="replace").decode() or "x", value)
    return made.getvalue()


def pickled(data, rng):
    """An archive whose features are a pickle that calls something."""
    if rng.random() < 0.8:
        return npz(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    head = members["X.npy"][:128]
    payload = pick(rng, [_Folder(), [_Folder()], {"a": _Folder()}, 3, [[[]]]])
    members["X.npy"] = head + pickle.dumps(payload, int(rng.integers(6)))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return made.getvalue()
