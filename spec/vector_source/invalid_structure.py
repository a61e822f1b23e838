"""Invalid vectors of the structure, FORMAT §12: R5, R7, R13 to R16 and R21."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vector_source.checkpoints import WEIGHTS, Tensor, WeightFile, compact, folder, noise, one_file
from vector_source.samples import (
    PART,
    plain,
    sample,
    with_manifest,
    with_notes,
    with_side_file,
    with_text,
    with_true_header,
)
from vector_source.vectors import Invalid
from vector_source.writer import Coding, Draft, assemble, draft

# Names of devices on Windows: FORMAT §3.4.
RESERVED = [
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{name}{n}" for name in ("COM", "LPT") for n in range(10)),
]
CANONICAL = ["canonical", None]
# Members of the structure with values that are not of their type.
TYPES: dict[str, list[Any]] = {
    "requires": [None, {}, [1]],
    "base": [None, []],
    "base.id": [5, []],
    "base.n_unused": [None, -1, True, 1 << 63],
    "base.files": [None, [5]],
    "target": [[]],
    "target.kind": [None, 1],
    "target.digests": [1, None, "true"],
    "target.weight_files": [None, {}],
    "target.weight_files.0": [None, [WEIGHTS, 1], [WEIGHTS, 1, CANONICAL, 0], [1, 1, CANONICAL]],
    "target.weight_files.0.1": [-1, "1", 1.0],
    "target.weight_files.0.2": [
        "canonical",
        [],
        [None, None],
        ["canonical"],
        ["canonical", {}],
        ["canonical", [["a", 1]]],
        ["canonical", [["a"]]],
        ["canonical", [["a", "b", "c"]]],
        ["canonical", None, None],
        ["stored", 8],
        ["stored", 8, -1],
        ["stored", "8", 8],
        ["stored", 8, 8, 8],
    ],
    "target.side_files": [{}],
    "target.side_files.0": [["config.json", 9], ["config.json", 9, 9, 9], [0, 9, 9]],
    "target.side_files.0.1": [-1, 9.0],
    "target.side_files.0.2": [-2, -1.0, None, False],
    "target.empty_folders": [None, [0]],
    "layouts": [{}, [[]]],
    "layouts.0": [["BF16", 16, "f2"], ["BF16", 16, "f2", [8], 0], [16, "BF16", "f2", [8]]],
    "layouts.0.1": [-16, 16.0],
    "layouts.0.2": [2],
    "layouts.0.3": [8, [8.0], [-8], [True], [1 << 63], None],
    "tensors": [[]],
    "tensors.names": [{}, [1, 2, 3, 4], [None] * 4],
    "tensors.layouts": [None, [-1, 0, 0, 0], ["0"] * 4],
    "tensors.base_files": [[-2, 0, -1, 0], [None] * 4, [-1.0] * 4],
    "tensors.base_names": [{"3": "gone"}, [[3]], [[3, "gone", 0]], [["3", "gone"]]],
    "tensors.base_layouts": [[3, 3], [[3, "3"]]],
    "tensors.keep": [[[3, -1]], [[3, 3.0]]],
    "tensors.n_chunks": [[-1, 0, 1, 1], None],
    "codings": [{}, [["ulp", "gaps", "planes"]]],
    "codings.0": [[0, "gaps", "planes", 0], ["ulp", None, "planes", 0], ["ulp", "gaps", 1, 0]],
    "codings.0.3": [2, -1, False, "0"],
    "chunks": [[]],
    "chunks.starts": [[-1, 0, 0], [0.0, 0, 0], None],
    "chunks.spans": [[True, 3, 6]],
    "chunks.nnz": [[3, 2, "1"]],
    "chunks.codings": [[-1, 1, 0]],
    "chunks.touched": [[2, 1, 1], [True, 1, 1]],
    "chunks.raw": [[-3, 1], None],
    "chunks.stored": [[-1], [None]],
}


def json_rules() -> list[Invalid]:
    """Return R5: spelling, members and types of the structure."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("json_" + name, why, "R5", "corrupt", data))

    def text(name: str, why: str, change: Callable[[bytes], bytes]) -> None:
        add(name, why, assemble(plain(), text=change))

    text("utf8", "not UTF-8", lambda t: t.replace(b'["w"]', b'["\xff"]'))
    text("utf8_overlong", "an overlong form", lambda t: t.replace(b'["w"]', b'["\xc1\xb7"]'))
    text("utf8_surrogate", "a surrogate", lambda t: t.replace(b'["w"]', b'["\xed\xa0\x80"]'))
    text("utf16", "UTF-16", lambda t: t.decode().encode("utf-16-le"))
    text("mark", "a byte order mark", lambda t: b"\xef\xbb\xbf" + t)
    text("empty", "nothing", lambda t: b"")
    text("null", "null", lambda t: b"null")
    text("list", "a list", lambda t: b"[" + t + b"]")
    text("cut", "text that ends early", lambda t: t[:-1])
    text("comma", "a comma too many", lambda t: t[:-1] + b",}")
    text("trailing", "text after the object", lambda t: t + b"{}")
    text("space_after", "a space after the object", lambda t: t + b" ")
    text("space_before", "a space before the object", lambda t: b" " + t)
    text("space", "spaces between tokens", lambda t: json.dumps(json.loads(t)).encode())
    text("line_end", "a line end after a comma", lambda t: t.replace(b",", b",\n", 1))
    text("zero", "a zero byte after the object", lambda t: t + b"\0")
    text("comment", "a comment", lambda t: t + b"//")
    text("sorted", "members sorted", lambda t: compact(dict(sorted(json.loads(t).items()))))
    text("nested", "nothing but 60 000 brackets", lambda t: b"[" * 60_000)
    kind = '"kind":"folder",'
    add("twice", "a member twice", with_text(kind, kind * 2))
    add(
        "twice_escaped", "twice, once escaped", with_text(kind, kind + kind.replace("k", "\\u006b"))
    )
    digests = '"digests":true'
    data = with_text(kind + digests, digests + "," + kind[:-1])
    add("order", "two members of an object exchanged", data)
    add("more", "an unknown member", with_text('{"requires"', '{"more":0,"requires"'))
    add("more_last", "an unknown last member", with_text('"keep":[],', '"keep":[],"more":[],'))
    names = '"names":["w"]'
    for name, string in (
        ("escape_letter", "\\u0077"),
        ("escape_slash", "\\/"),
        ("escape_delete", "\\u007f"),
        ("escape_wide", "\\u00e9"),
        ("escape_pair", "\\ud83d\\ude00"),
        ("escape_line", "\\u000a"),
        ("escape_upper", "\\u001F"),
        ("escape_unknown", "\\x20"),
        ("escape_surrogate", "\\ud800"),
        ("escape_low", "\\udc00\\ud800"),
        ("control", "\n"),
        ("control_zero", "\0"),
    ):
        why = f"the string {string!r}, that has another spelling or none"
        add(name, why, with_text(names, f'"names":["{string}"]'))
    unused = '"n_unused":0'
    for name, number in (
        ("fraction", "0.0"),
        ("exponent", "1e0"),
        ("minus_zero", "-0"),
        ("large", str(1 << 63)),
        ("larger", "1" + "0" * 5000),
        ("leading_zero", "01"),
        ("plus", "+1"),
        ("hex", "0x1"),
        ("nan", "NaN"),
        ("infinity", "Infinity"),
        ("minus_infinity", "-Infinity"),
        ("huge", "1e999"),
    ):
        why = f"{number[:30]} instead of an integer"
        add("integer_" + name, why, with_text(unused, unused[:-1] + number))
    for path, values in TYPES.items():
        for n, value in enumerate(values):
            name = path.replace(".", "_") + "_" + "abcdefghijklmnop"[n]
            why = f"{path} is {json.dumps(value)[:40]}"
            data = with_manifest({path: value})
            out.append(Invalid("type_" + name, why, "R5", "corrupt", data))
    for path in TYPES:
        if not path[-1].isdigit():
            name = "missing_" + path.replace(".", "_")
            data = with_manifest({}, drop=path)
            out.append(Invalid(name, f"{path} is missing", "R5", "corrupt", data))
    return out


def notes() -> list[Invalid]:
    """Return R7: notes."""
    deep = b"[" * 64 + b"]" * 64
    objects = b'{"a":' * 63 + b"{}" + b"}" * 63
    cases = {
        "empty": ("nothing", b""),
        "null": ("null", b"null"),
        "list": ("a list", b"[]"),
        "string": ("a string", b'"{}"'),
        "number": ("a number", b"0"),
        "utf8": ("not UTF-8", b'{"a":"\xff"}'),
        "utf8_surrogate": ("UTF-8 of a surrogate", b'{"a":"\xed\xa0\x80"}'),
        "mark": ("a byte order mark", b"\xef\xbb\xbf{}"),
        "cut": ("text that ends early", b'{"a":1'),
        "comma": ("a comma too many", b'{"a":1,}'),
        "comment": ("a comment", b"{}//"),
        "zero": ("a zero byte after the object", b"{}\0"),
        "two": ("two objects", b"{}{}"),
        "single": ("single quotes", b"{'a':1}"),
        "twice": ("a member twice", b'{"a":1,"a":1}'),
        "twice_within": ("a member of info twice", b'{"info":[{"b":1,"b":2}]}'),
        "twice_escaped": ("a member twice, once escaped", b'{"a":1,"\\u0061":1}'),
        "nan": ("NaN", b'{"a":NaN}'),
        "infinity": ("Infinity", b'{"a":[Infinity]}'),
        "minus_infinity": ("-Infinity", b'{"a":-Infinity}'),
        "leading_zero": ("a number with a leading zero", b'{"a":01}'),
        "plus": ("a number with a plus sign", b'{"a":+1}'),
        "point": ("a number that ends with a point", b'{"a":1.}'),
        "true": ("True", b'{"a":True}'),
        "control": ("a bare control character", b'{"a":"\n"}'),
        "escape": ("an unknown escape", b'{"a":"\\x20"}'),
        "surrogate": ("an escape of a lone surrogate", b'{"a":"\\ud800"}'),
        "surrogate_key": ("an escape of a lone surrogate in a key", b'{"\\udc00\\ud800":1}'),
        "nested": ("lists nested 65 deep", b'{"a":' + deep + b"}"),
        "nested_objects": ("objects nested 65 deep", b'{"a":' + objects + b"}"),
        "nested_much": ("nested 30 001 deep", b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
        "nested_open": ("60 000 opening brackets", b"[" * 60_000),
    }
    return [
        Invalid("notes_" + name, "notes: " + why, "R7", "corrupt", with_notes(text))
        for name, (why, text) in cases.items()
    ]


def features() -> list[Invalid]:
    """Return R21: what version 1 does not know."""
    out = []
    for name, path, value in (
        ("feature", "requires", ["later"]),
        ("feature_empty", "requires", [""]),
        ("kind", "target.kind", "archive"),
        ("header", "target.weight_files.0.2", ["pretty", 4]),
        ("header_alone", "target.weight_files.0.2", ["Canonical"]),
        ("element", "layouts.0", ["BF17", 16, "g2", [4]]),
        ("element_width", "layouts.0", ["BF17", 16, "i3", [3]]),
        ("element_empty", "layouts.0", ["BF17", 16, "", [4]]),
        ("element_unused", "layouts", [["BF16", 16, "f2", [4]], ["X", 8, "u1", [4]]]),
        ("values", "codings.0.0", "xor"),
        ("index", "codings.0.1", "gap8"),
        ("index_case", "codings.0.1", "Gaps"),
        ("packing", "codings.0.2", "raw"),
        ("unused", "codings", [["ulp", "gaps", "planes", 0], ["ulp", "all", "planes", 0]]),
    ):
        why = f"{path} is {json.dumps(value)}"
        data = with_manifest({path: value}, of=plain)
        out.append(Invalid("unknown_" + name, why, "R21", "unsupported_feature", data))
    return out


def paths() -> list[Invalid]:
    """Return R13 and R14: paths."""
    out = []

    def add(name: str, why: str, data: bytes, breaks: str = "R13") -> None:
        out.append(Invalid("path_" + name, why, breaks, "corrupt", data))

    for name, path in (
        ("absolute", "/etc/passwd"),
        ("up", "../config.json"),
        ("up_only", ".."),
        ("up_within", "a/../../config.json"),
        ("up_last", "a/.."),
        ("dot", "./config.json"),
        ("dot_only", "."),
        ("dot_within", "a/./b"),
        ("empty", ""),
        ("slash_last", "a/"),
        ("slash_twice", "a//b"),
        ("backslash", "..\\config.json"),
        ("drive", "C:config.json"),
        ("stream", "config.json:x"),
        ("zero", "config.json\0.txt"),
        ("newline", "config\n.json"),
        ("escape", "\x1b[2J"),
        ("delete", "config\x7f.json"),
        ("long_component", "c" * 256),
        ("long_component_utf8", "\u00e9" * 128),
        ("long", "/".join(["c" * 255] * 16) + "/c"),
        ("deep", "/".join(["d"] * 65)),
        ("star", "config*.json"),
        ("question", "config?.json"),
        ("quote", 'config".json'),
        ("less", "config<.json"),
        ("greater", "config>.json"),
        ("bar", "config|.json"),
        ("ends_dot", "config.json."),
        ("ends_dot_folder", "a./config.json"),
        ("ends_space", "config.json "),
        ("git", ".git/config"),
        ("git_case", ".GiT/config"),
        ("git_file", "a/.git"),
        *((f"reserved_{name.lower()}", name) for name in RESERVED),
        ("reserved_case", "nUl"),
        ("reserved_suffix", "aux.tar.gz"),
        ("reserved_folder", "a/Lpt1.d/config.json"),
    ):
        add(name, f"a side file {path!r:.40}", assemble(with_side_file(path)))
    for kind, member, held in (
        ("weights", "target.weight_files.0.0", "../model.safetensors"),
        ("folder", "target.empty_folders.0", "../logs"),
        ("base", "base.files.0", "../model.safetensors"),
    ):
        add(f"{kind}_up", f"{member} is {held}", with_manifest({member: held}))
    add("base_device", "a base file NUL", with_manifest({"base.files.0": "NUL"}))
    add("base_empty", "a base file without a name", with_manifest({"base.files.0": ""}))
    add("folder_absolute", "an empty folder /a", with_manifest({"target.empty_folders.0": "/a"}))

    def folders(name: str, why: str, *listed: str, breaks: str = "R13") -> None:
        add(name, why, with_manifest({"target.empty_folders": list(listed)}), breaks)

    folders("folder_twice", "an empty folder twice", "logs", "logs")
    folders("folders_order", "empty folders not sorted", "tmp", "logs", breaks="R14")
    folders("folders_utf16", "sorted as UTF-16", "\U0001f600", "\uffff", breaks="R14")
    folders("folders_case", "sorted without case", "a", "B", breaks="R14")
    folders("folders_slash", "sorted by component", "a/b", "a-b", breaks="R14")
    folders("folder_within", "an empty folder that holds another", "logs", "logs/sub")
    folders("folder_within_apart", "the same, not next to each other", "a", "a-b", "a/b")
    folders("folder_is_file", "an empty folder and a side file of one path", "kept.txt", "logs")
    folders("folder_in_file", "an empty folder within a file", "kept.txt/logs")
    folders("shadows_weights", "an empty folder and a weight file of one path", WEIGHTS)
    folders("case_folder", "empty folders that differ in case", "\u00c4", "\u00e4")
    folders("case_side", "an empty folder, a side file but for case", "Config.JSON")
    folders("case_weights", "an empty folder, a weight file but for case", "Model.safetensors")
    folders("case_in_file", "an empty folder within a file but for case", "KEPT.txt/logs")
    folders("case_full", "one path where \u00df folds to ss", "strasse", "stra\u00dfe")
    folders("form", "empty folders in two forms of Unicode", "e\u0301", "\u00e9")
    folders("form_within", "an empty folder within another's other form", "e\u0301", "\u00e9/logs")
    folders("form_folded", "one path where case folding undoes NFC", "\u0390", "\u1fd3")
    for name, path in (
        ("suffix_python", "run.py"),
        ("suffix_case", "MODEL.SAFETENSORS"),
        ("suffix_longer", "part.safetensorsx"),
    ):
        weights = {"target.weight_files.0.0": path}
        add(name, f"a weight file {path} in a folder", with_manifest(weights, of=plain))
    side_path = "config.safetensors"
    add("suffix_side", f"a side file {side_path}", assemble(with_side_file(side_path)))
    weights = {"target.weight_files.0.0": "kept.txt/model.safetensors"}
    add("weights_in_file", "a weight file within a side file", with_manifest(weights))
    weights = {"target.weight_files.0.0": PART}
    add("weights_twice", "two weight files of one path", with_manifest(weights))
    add(
        "side_twice",
        "two side files of one path",
        with_manifest({"target.side_files.1.0": "config.json"}),
    )
    delta = sample()
    delta.structure["target"]["side_files"].reverse()
    delta.digests["side_files"].reverse()
    add("side_order", "side files not sorted", assemble(delta), "R14")
    return out


def target_files() -> list[Invalid]:
    """Return R15: kind and metadata."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("files_" + name, why, "R15", "corrupt", data))

    one = WeightFile(WEIGHTS, {"w": noise("U8", 3, 1)})
    for name in ("two", "side", "folder"):
        target = folder(WeightFile(WEIGHTS, one.tensors))
        if name == "two":
            target.weight_files.append(WeightFile(PART, {}))
        elif name == "side":
            target.side_files["a"] = b""
        else:
            target.empty_folders.append("a")
        delta = draft(folder(one), target)
        delta.structure["target"]["kind"] = "file"
        add(f"kind_{name}", "a target of kind file that is more than a file", assemble(delta))
    delta = draft(folder(one), one_file(one.tensors, path="a/b.safetensors"))
    add("kind_deep", "a target of kind file whose path has two components", assemble(delta))
    delta = draft(folder(one), folder())
    delta.structure["target"]["kind"] = "file"
    add("kind_none", "a target of kind file without a weight file", assemble(delta))
    # The digests are those of the headers that a reader without this rule would write.
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    twice = b'{"__metadata__":{"a":"1","a":"1"},"w":' + compact(entry) + b"}"
    for name, pairs, header in (
        ("twice", "a1 a1", twice),
        ("twice_last", "a1 b2 a3", {"__metadata__": {"a": "3", "b": "2"}, "w": entry}),
        ("twice_first", "a1 b2 a3", {"__metadata__": {"a": "1", "b": "2"}, "w": entry}),
    ):
        delta = with_true_header(plain(), header)
        metadata = [list(pair) for pair in pairs.split()]
        delta.structure["target"]["weight_files"][0][2] = ["canonical", metadata]
        add(f"metadata_{name}", "a key of the metadata twice", assemble(delta))
    return out


def row_names() -> list[Invalid]:
    """Return R16 where the headers are those that a reader without these rules would write."""
    out = []

    def add(name: str, why: str, delta: Draft, header: dict[str, Any] | bytes) -> None:
        made = assemble(with_true_header(delta, header))
        out.append(Invalid("row_" + name, why, "R16", "corrupt", made))

    both = {"w": noise("U8", 4, 1), "v": noise("U8", 4, 2)}
    entries = [{"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]} for at in (0, 4)]
    first, second = (compact(entry) for entry in entries)
    for name, header in (
        ("name_twice", {"w": entries[1]}),
        ("name_twice_first", {"w": entries[0]}),
        ("name_twice_both", b'{"w":' + first + b',"w":' + second + b"}"),
    ):
        delta = draft(folder(WeightFile(WEIGHTS, both)), folder(WeightFile(WEIGHTS, both)))
        delta.structure["tensors"]["names"] = ["w", "w"]
        add(name, "a name twice in one file", delta, header)
    delta = plain()
    delta.structure["tensors"]["names"] = ["__metadata__"]
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    add("name_metadata", "a tensor named __metadata__", delta, {"__metadata__": entry})
    delta = plain()
    delta.structure["target"]["weight_files"][0][1] = 0
    add("n_none", "a row that belongs to no file", delta, {})
    return out


def rows() -> list[Invalid]:
    """Return R16: layouts and rows."""
    out = []

    def edit(name: str, why: str, edits: dict[str, Any]) -> None:
        out.append(Invalid("row_" + name, why, "R16", "corrupt", with_manifest(edits)))

    for name, why, layout in (
        ("dtype_bits", "BF16 of 8 bits", ["BF16", 8, "f1", [8]]),
        ("dtype_element", "BF16 in integer order", ["BF16", 16, "i2", [8]]),
        ("dtype_width", "I64 as elements of 4 bytes", ["I64", 64, "i4", [8]]),
        ("dtype_f4", "F4 of 8 bits", ["F4", 8, "i1", [8]]),
        ("bits_f4", "a tensor of 3 values of F4", ["F4", 4, "i1", [3]]),
        ("bits_f6", "a tensor of 3 values of F6_E2M3", ["F6_E2M3", 6, "i1", [3]]),
        ("bits_f6_more", "a tensor of 1 value of F6_E3M2", ["F6_E3M2", 6, "i1", []]),
        ("bits_unknown", "a tensor of 9 values of 1 bit", ["X", 1, "i1", [3, 3]]),
        ("elements", "a tensor of 3 bytes in elements of 2", ["X", 8, "i2", [3]]),
        ("elements_wide", "a tensor of 12 bytes in elements of 8", ["X", 32, "f8", [3]]),
    ):
        edit(name, why, {"layouts.0": layout})
        edit(
            name + "_unused",
            why + ", not used",
            {"layouts": [*sample().structure["layouts"], layout]},
        )
    files, tensors = "target.weight_files", "tensors."
    columns = sample().structure["tensors"]
    for column in ("names", "layouts", "base_files", "n_chunks"):
        value = columns[column]
        edit(f"{column}_less", f"one entry of {column} too few", {tensors + column: value[:-1]})
        edit(
            f"{column}_more",
            f"one entry of {column} too many",
            {tensors + column: [*value, value[0]]},
        )
    edit("n_less", "n add up to less", {f"{files}.0.1": 0})
    edit("n_more", "n add up to more", {f"{files}.0.1": 2})
    edit("n_most", "n of 2^63 - 1", {f"{files}.0.1": (1 << 63) - 1})
    edit("n_moved", "n of the other file", {f"{files}.0.1": 5, f"{files}.1.1": 0})
    for column, values in {
        "base_names": ("x", "y"),
        "base_layouts": (1, 2),
        "keep": (1, 1),
    }.items():
        pairs = [[0, values[0]], [1, values[1]]]
        for name, why, wrong in (
            ("order", "do not ascend", pairs[::-1]),
            ("twice", "name a row twice", [pairs[0], pairs[0]]),
            ("no_base", "name a row without a base", [[2, values[0]]]),
            ("outside", "name a row that is not there", [[4, values[0]]]),
            ("far", "name row 2^62", [[1 << 62, values[0]]]),
        ):
            edit(f"{column}_{name}", f"pairs of {column} {why}", {tensors + column: wrong})
    edit("base_name_own", "a base name that is the row's own", {"tensors.base_names": [[0, "w"]]})
    own = columns["layouts"][0]
    edit(
        "base_layout_own",
        "a base layout that is the row's own",
        {"tensors.base_layouts": [[0, own]]},
    )
    n = len(sample().structure["layouts"])
    edit("layout", "a layout that is not there", {"tensors.layouts.0": n})
    edit("base_layout", "a base layout that is not there", {"tensors.base_layouts.0.1": n})
    edit("base_file", "a base file that is not there", {"tensors.base_files.0": 1})
    edit("name_twice_stored", "a name twice in a stored header", {"tensors.names.2": "same"})
    edit("keep_all", "keep of all elements", {"tensors.keep": [[0, 8]]})
    edit("keep_more", "keep of more elements than there are", {"tensors.keep": [[0, 9]]})
    edit("keep_shrunk", "keep of as many as the smaller tensor has", {"tensors.keep.0.1": 4})
    delta = sample(Coding(touched=False), known=False)
    why = "neither target digests nor touched digests"
    out.append(Invalid("row_no_digests", why, "R16", "corrupt", assemble(delta)))
    for name, own_bits in (("retyped", None), ("recoded", (16, "f2"))):
        old = noise("U8", 8, 1)
        dtype = "I8" if own_bits is None else "X"
        first = Tensor("U8" if own_bits is None else "X", (8,), old.data, own_bits and (8, "i1"))
        second = Tensor(dtype, (4,) if own_bits else (8,), old.data, own_bits)
        base, target = (folder(WeightFile(WEIGHTS, {"w": one})) for one in (first, second))
        delta = draft(base, target)
        delta.structure["tensors"]["keep"] = [[0, 0]]
        why = "keep of a row whose dtype, bits or element type changes"
        out.append(Invalid("row_keep_" + name, why, "R16", "corrupt", assemble(delta)))
    return out
