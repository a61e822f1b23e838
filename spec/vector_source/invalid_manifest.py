"""Invalid vectors of the manifest's JSON, members and paths: FORMAT §12, R11, R12 and R14."""

from __future__ import annotations

import json
from collections.abc import Callable

from vector_source.samples import (
    STORED,
    Invalid,
    plain,
    sample,
    with_manifest,
    with_side_file,
    with_text,
)
from vector_source.valid import WEIGHTS, folder, noise
from vector_source.writer import WeightFile, assemble, draft

# Names of devices on Windows: FORMAT §3.4.
RESERVED = [
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{name}{n}" for name in ("COM", "LPT") for n in range(10)),
]
MEMBERS = (
    "info",
    "base.id",
    "target.kind",
    "target.weight_files.0.metadata",
    "target.side_files.0.carried",
    "tensors.0.delta",
    "tensors.0.target.digest",
    "tensors.0.delta.touched",
)


def json_rules() -> list[Invalid]:
    """Return R11: JSON and types of members."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("json_" + name, why, "R11", "corrupt", data))

    def text(name: str, why: str, change: Callable[[bytes], bytes]) -> None:
        add(name, why, assemble(plain(), text=change))

    text("utf8", "no UTF-8", lambda t: t.replace(b'"gone"', b'"g\xffne"'))
    text(
        "utf8_overlong", "an overlong UTF-8 form", lambda t: t.replace(b'"gone"', b'"g\xc1\xafne"')
    )
    text(
        "utf8_surrogate", "UTF-8 of a surrogate", lambda t: t.replace(b'"gone"', b'"\xed\xa0\x80"')
    )
    text("mark", "a byte order mark", lambda t: b"\xef\xbb\xbf" + t)
    text("empty", "nothing", lambda t: b"")
    text("list", "a list", lambda t: b"[" + t + b"]")
    text("comma", "a comma too many", lambda t: t[:-1] + b",}")
    text("trailing", "text after the object", lambda t: t + b"{}")
    text("zero", "a zero byte after the object", lambda t: t + b"\0")
    text("comment", "a comment", lambda t: t + b"//")
    add(
        "twice", "a member twice", with_text('"kind":"folder",', '"kind":"folder","kind":"folder",')
    )
    add(
        "twice_escaped",
        "a member twice, once escaped",
        with_text('"kind":"folder",', '"kind":"folder","\\u006bind":"folder",'),
    )
    add(
        "twice_info", "a member of info twice", with_text('"info":{}', '"info":{"a":{"b":1,"b":1}}')
    )
    for word in ("NaN", "Infinity", "-Infinity"):
        name = word.lower().replace("-", "minus_")
        add(name, f"{word} in info", with_text('"info":{}', f'"info":{{"a":{word}}}'))
    n_tensors = '"n_tensors":1,"header"'
    for name, number in (
        ("fraction", "1.0"),
        ("exponent", "1e0"),
        ("true", "true"),
        ("null", "null"),
        ("string", '"1"'),
        ("negative", "-1"),
        ("large", str(1 << 63)),
        ("larger", "1" + "0" * 5000),
        ("leading_zero", "01"),
        ("plus", "+1"),
        ("hex", "0x1"),
    ):
        why = f"{number[:30]} where an integer from 0 to 2^63 - 1 belongs"
        add("integer_" + name, why, with_text(n_tensors, n_tensors.replace("1", number)))
    add("info_low", "-2^63 - 1 in info", with_text('"info":{}', f'"info":{{"a":{-(1 << 63) - 1}}}'))
    add("info_high", "2^63 in info", with_text('"info":{}', f'"info":{{"a":{1 << 63}}}'))
    add("surrogate", "a lone surrogate in a name", with_text('"name":"gone"', '"name":"g\\ud800"'))
    add(
        "surrogate_low",
        "a lone low surrogate",
        with_text('"name":"gone"', '"name":"g\\udc00\\ud800"'),
    )
    add(
        "surrogate_info", "a lone surrogate in info", with_text('"info":{}', '"info":{"\\ud800":1}')
    )
    add(
        "control",
        "a bare control character in a string",
        with_text('"name":"gone"', '"name":"g\n"'),
    )
    add("escape", "an unknown escape", with_text('"name":"gone"', '"name":"g\\x20"'))
    for path, value in (
        ("tensors", {}),
        ("tensors.0", []),
        ("tensors.0.name", 5),
        ("tensors.0.base", "w"),
        ("tensors.0.base.shape", 40),
        ("tensors.0.base.shape", [40.0]),
        ("tensors.0.base.shape", [True, 40]),
        ("tensors.0.base.shape", [-40]),
        ("tensors.0.base.shape", [1 << 63]),
        ("tensors.0.base.dtype", 16),
        ("tensors.0.base.dtype", None),
        ("tensors.0.base.digest", None),
        ("tensors.0.base.digest", "0" * 31),
        ("tensors.0.base.digest", "0" * 64),
        ("tensors.0.base.digest", "A" * 32),
        ("tensors.0.base.digest", "g" * 32),
        ("tensors.0.target.digest", 0),
        ("tensors.0.delta", []),
        ("tensors.0.delta", False),
        ("tensors.0.delta.keep", False),
        ("tensors.0.delta.keep", None),
        ("tensors.0.delta.values", 1),
        ("tensors.0.delta.touched", {}),
        ("tensors.0.delta.touched", ["0" * 16]),
        ("tensors.0.delta.touched", ["0" * 16, None]),
        ("tensors.0.delta.touched", ["0" * 16, "0" * 14]),
        ("tensors.0.delta.chunks", None),
        ("tensors.0.delta.chunks.0", {}),
        ("tensors.0.delta.chunks.0.0", "0"),
        ("tensors.0.delta.chunks.0.1", 3.0),
        ("tensors.0.delta.chunks.0.2", 8),
        ("tensors.0.delta.chunks.0.4", 14),
        ("tensors.0.delta.chunks.0.4.2", None),
        ("base", None),
        ("base.id", 5),
        ("base.fingerprint", None),
        ("base.fingerprint", "0" * 32),
        ("target", []),
        ("target.kind", None),
        ("target.fingerprint", ""),
        ("target.weight_files", None),
        ("target.weight_files.0", None),
        ("target.weight_files.0.path", None),
        ("target.weight_files.0.header", True),
        ("target.weight_files.0.metadata", []),
        ("target.weight_files.0.metadata", {"format": 5}),
        ("target.weight_files.1.metadata", {}),
        ("target.side_files", {}),
        ("target.side_files.0.path", 0),
        ("target.side_files.0.n_bytes", -1),
        ("target.side_files.0.digest", "0" * 32),
        ("target.side_files.0.carried", 1),
        ("target.side_files.0.carried", None),
        ("target.empty_folders", None),
        ("target.empty_folders.0", 0),
        ("info", []),
        ("info", None),
        ("payload_digest", None),
    ):
        n = sum(one.name.startswith("type_" + path.replace(".", "_")) for one in out)
        name = "type_" + path.replace(".", "_") + (f"_{n + 1}" if n else "")
        why = f"{path} is {json.dumps(value)[:40]}"
        out.append(Invalid(name, why, "R11", "corrupt", with_manifest({path: value})))
    for length in (4, 6):
        delta = sample()
        chunks = delta.manifest["tensors"][0]["delta"]["chunks"]
        chunks[0] = (chunks[0] + [0])[:length]
        why = f"a chunk is a list of {length}"
        out.append(Invalid(f"type_chunk_of_{length}", why, "R11", "corrupt", assemble(delta)))
    for path in MEMBERS:
        name = "missing_" + path.replace(".", "_")
        data = with_manifest({}, drop=path)
        out.append(Invalid(name, f"{path} is missing", "R11", "corrupt", data))
    return out


def features() -> list[Invalid]:
    """Return R12: what version 1 does not know."""
    out = []
    objects = [path.rpartition(".")[0] for path in MEMBERS]
    for path in objects:
        member = f"{path}.more" if path else "more"
        name = "unknown_member_" + (path.replace(".", "_") or "top")
        data = with_manifest({member: None})
        why = f"an unknown member {member}"
        out.append(Invalid(name, why, "R12", "unsupported_feature", data))
    for name, path, value in (
        ("dtype", "tensors.0.target.dtype", "BF17"),
        ("dtype_case", "tensors.0.target.dtype", "bf16"),
        ("dtype_f4", "tensors.0.base.dtype", "F4_E2M1"),
        ("kind", "target.kind", "archive"),
        ("header", "target.weight_files.0.header", "pretty"),
        ("index", "tensors.0.delta.chunks.0.2", "gap32"),
        ("index_empty", "tensors.0.delta.chunks.0.2", ""),
        ("packing", "tensors.0.delta.chunks.0", [0, 3, "gap8", 3, [15, 15, 15], "planes", 0]),
        ("values", "tensors.0.delta.values", "xor"),
    ):
        why = f"{path} is {json.dumps(value)}"
        data = with_manifest({path: value}, of=plain)
        out.append(Invalid("unknown_" + name, why, "R12", "unsupported_feature", data))
    return out


def paths() -> list[Invalid]:
    """Return R14: paths."""
    out = []

    def add(name: str, why: str, data: bytes) -> None:
        out.append(Invalid("path_" + name, why, "R14", "corrupt", data))

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
        ("weights", "target.weight_files.0.path", "../model.safetensors"),
        ("folder", "target.empty_folders.0", "../logs"),
    ):
        add(f"{kind}_up", f"{member} is {held}", with_manifest({member: held}))
    add("folder_absolute", "an empty folder /a", with_manifest({"target.empty_folders.0": "/a"}))
    add("folder_twice", "an empty folder twice", with_manifest({"target.empty_folders.1": "logs"}))
    folders = {"target.empty_folders": ["tmp", "logs"]}
    add("folders_order", "empty folders out of order", with_manifest(folders))
    folders = {"target.empty_folders": ["logs", "logs/sub"]}
    add("folder_within", "an empty folder that holds another", with_manifest(folders))
    folders = {"target.empty_folders": ["kept.txt", "logs"]}
    add("folder_is_file", "an empty folder and a side file of one path", with_manifest(folders))
    folders = {"target.empty_folders": ["kept.txt/logs"]}
    add("folder_in_file", "an empty folder within a file", with_manifest(folders))
    folders = {"target.empty_folders": [WEIGHTS]}
    add("shadows_weights", "an empty folder and a weight file of one path", with_manifest(folders))
    folders = {"target.empty_folders": ["\u00c4", "\u00e4"]}
    add("case_folder", "empty folders that differ in case", with_manifest(folders))
    folders = {"target.empty_folders": ["Config.JSON"]}
    add("case_side", "an empty folder, a side file but for case", with_manifest(folders))
    folders = {"target.empty_folders": ["Model.safetensors"]}
    add("case_weights", "an empty folder, a weight file but for case", with_manifest(folders))
    folders = {"target.empty_folders": ["KEPT.txt/logs"]}
    add("case_in_file", "an empty folder within a file but for case", with_manifest(folders))
    folders = {"target.empty_folders": ["strasse", "stra\u00dfe"]}
    add("case_full", "empty folders that are one where \u00df folds to ss", with_manifest(folders))
    folders = {"target.empty_folders": ["e\u0301", "\u00e9"]}
    add("form", "empty folders in two forms of Unicode", with_manifest(folders))
    folders = {"target.empty_folders": ["e\u0301", "\u00e9/logs"]}
    add("form_within", "an empty folder within another in another form", with_manifest(folders))
    for name, path in (
        ("suffix_python", "run.py"),
        ("suffix_case", "MODEL.SAFETENSORS"),
        ("suffix_longer", "part.safetensorsx"),
    ):
        weights = {"target.weight_files.0.path": path}
        add(name, f"a weight file {path} in a folder", with_manifest(weights, of=plain))
    side_path = "config.safetensors"
    add("suffix_side", f"a side file {side_path}", assemble(with_side_file(side_path)))
    weights = {"target.weight_files.0.path": "kept.txt/model.safetensors"}
    add("weights_in_file", "a weight file within a side file", with_manifest(weights))
    delta = sample()
    delta.manifest["target"]["weight_files"][0]["path"] = STORED
    add("weights_twice", "two weight files of one path", assemble(delta))
    delta = sample()
    delta.manifest["target"]["side_files"].reverse()
    add("side_order", "side files out of order", assemble(delta))
    delta = sample()
    side = delta.manifest["target"]["side_files"]
    side[1] = dict(side[0], carried=False)
    add("side_twice", "two side files of one path", assemble(delta))
    for name in ("two", "side", "folder"):
        base = folder(WeightFile(WEIGHTS, {"w": noise("U8", 3, 1)}))
        target = folder(WeightFile(WEIGHTS, {"w": noise("U8", 3, 1)}))
        if name == "two":
            target.weight_files.append(WeightFile(STORED, {}))
        elif name == "side":
            target.side_files["a"] = b""
        else:
            target.empty_folders.append("a")
        delta = draft(base, target)
        delta.manifest["target"]["kind"] = "file"
        add(f"kind_file_{name}", "a target of kind file that is more than a file", assemble(delta))
    base = folder(WeightFile(WEIGHTS, {"w": noise("U8", 3, 1)}))
    delta = draft(base, base)
    delta.manifest["target"] |= {"kind": "file"}
    delta.manifest["target"]["weight_files"][0]["path"] = "a/b.safetensors"
    add("kind_file_deep", "a target of kind file whose path has two components", assemble(delta))
    delta.manifest["target"]["weight_files"] = []
    delta.manifest["tensors"][0] |= {"target": None}
    add("kind_file_none", "a target of kind file without a weight file", assemble(delta))
    return out
