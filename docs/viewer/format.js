// The header and the manifest of a delta, checked by the rules of FORMAT §2 to §5, §9 and §11.
"use strict";

(() => {
  const { Refused, blake3, check, checkApart, checkPath, checkSorted, decompress, exact, hex } = sparsedelta;
  const { CompactReader, nBytes, strictObject } = sparsedelta;

  const MAX_HEADER = 1024;
  const MAX_MANIFEST = 2 ** 27;
  const MAX_CARRIED = 2 ** 27;
  const MAX_ROWS = 2 ** 19;
  const MAX_CHUNKS = 2 ** 20;
  const MAX_FILES = 2 ** 16;
  const MAX_FOLDERS = 2 ** 12;
  const MAX_BITS = 1n << 63n;
  const FIRST_BYTES = 2 ** 16; // the first read usually holds the header and the manifest

  // dtype: [bits per value, element type]
  const DTYPES = new Map();
  for (const [bits, element, names] of [
    [8, "i1", "BOOL U8 I8 F8_E8M0"], [8, "f1", "F8_E5M2 F8_E4M3 F8_E4M3FNUZ F8_E5M2FNUZ"],
    [4, "i1", "F4"], [6, "i1", "F6_E2M3 F6_E3M2"], [16, "i2", "U16 I16"], [16, "f2", "F16 BF16"],
    [32, "i4", "U32 I32"], [32, "f4", "F32"], [64, "i8", "U64 I64 C64"], [64, "f8", "F64"],
  ]) {
    for (const name of names.split(" ")) DTYPES.set(name, [bits, element]);
  }

  // ---- the container (§2)

  const HEADER = /^.*"format_version":"([^"]*)","manifest_digest":"([0-9a-f]{64})".*"shape":\[([0-9]{1,19})\].*"shape":\[([0-9]{1,19})\]/s;

  function headerText(version, digest, size, payload) {
    return (
      `{"__metadata__":{"format":"sparsedelta","format_version":"${version}","manifest_digest":"${digest}"},` +
      `"manifest":{"dtype":"U8","shape":[${size}],"data_offsets":[0,${size}]},` +
      `"payload":{"dtype":"U8","shape":[${payload}],"data_offsets":[${size},${size + payload}]}}`
    );
  }

  /** Return `{digest, manifestBytes, payloadBytes}` of a header's text. */
  function readHeader(text) {
    const found = HEADER.exec(text);
    check(found, "bad_magic", "this is not a sparsedelta file");
    const [, version, digest, size, payload] = found;
    const expected = headerText(version, digest, BigInt(size), BigInt(payload));
    const spaces = " ".repeat(-expected.length & 7);
    check(text === expected + spaces, "bad_magic", "this is not a sparsedelta file");
    check(
      version === "1", "unsupported_version",
      `format version ${JSON.stringify(version.slice(0, 40))}; this page reads version 1`,
    );
    check(BigInt(size) <= MAX_MANIFEST, "limit_exceeded", `a manifest of ${size} bytes`);
    return { digest, manifestBytes: Number(size), payloadBytes: BigInt(payload) };
  }

  /**
   * Read and check the header and the manifest of a delta; the payload is not read.
   *
   * source: `read(offset, length)` returns a promise of a Uint8Array, shorter at the end of the file; after the
   * first read, `size` is the size of the file.
   */
  async function readDelta(source) {
    const first = await source.read(0, FIRST_BYTES);
    check(first.length >= 8, "truncated", "the file ends within the first 8 bytes");
    const view = new DataView(first.buffer, first.byteOffset, first.length);
    const n = view.getBigUint64(0, true);
    check(n <= MAX_HEADER, "limit_exceeded", `a header of ${n} bytes; this is not a sparsedelta file`);
    const begin = 8 + Number(n);
    check(begin <= first.length, "truncated", "the file ends within its header");
    const header = readHeader(String.fromCharCode(...first.subarray(8, begin)));
    const whole = BigInt(begin + header.manifestBytes) + header.payloadBytes;
    check(source.size >= whole, "truncated", `the file has ${source.size} of ${whole} bytes`);
    check(BigInt(source.size) === whole, "corrupt", "bytes follow the payload");
    const end = begin + header.manifestBytes;
    const manifest =
      end <= first.length ? first.subarray(begin, end) : await source.read(begin, header.manifestBytes);
    check(manifest.length === header.manifestBytes, "truncated", "the file ends within its manifest");
    check(hex(blake3(manifest)) === header.digest, "corrupt", "the digest of the manifest is wrong");
    const delta = readManifest(manifest);
    check(
      BigInt(delta.payloadBytes) === header.payloadBytes, "corrupt",
      "the payload has another size than its parts",
    );
    return { ...delta, fileBytes: source.size, headerBytes: begin, manifestBytes: manifest.length };
  }

  // ---- the manifest (§3, §8, §9)

  class Cursor {
    constructor(data) {
      this.data = data;
      this.at = 0;
    }

    take(n) {
      check(this.at + n <= this.data.length, "corrupt", "the manifest is too short");
      this.at += n;
      return this.data.subarray(this.at - n, this.at);
    }

    end() {
      check(this.at === this.data.length, "corrupt", "the manifest is too long");
    }
  }

  function openStream(stored, raw) {
    check(stored.length <= raw, "corrupt", "a stored size is above its raw size");
    if (stored.length === raw) return stored;
    check(stored.length > 0, "corrupt", "a stream is missing");
    return decompress(stored, raw);
  }

  function readManifest(manifest) {
    const cursor = new Cursor(manifest);
    const head = cursor.take(16);
    const [raw, stored, rawNotes, storedNotes] = [0, 4, 8, 12].map((at) =>
      new DataView(head.buffer, head.byteOffset + at, 4).getUint32(0, true),
    );
    check(raw <= 4 * manifest.length + 2 ** 19, "limit_exceeded", `a structure of ${raw} bytes`);
    check(rawNotes <= 2 ** 20, "limit_exceeded", `notes of ${rawNotes} bytes`);
    const structure = openStream(cursor.take(stored), raw);
    checkValues(structure, Math.floor(manifest.length / 3) + 2 ** 16);
    const delta = readStructure(structure);
    delta.notes = strictObject(openStream(cursor.take(storedNotes), rawNotes), "the notes");
    readDigests(delta, cursor);
    cursor.end();
    return delta;
  }

  function checkValues(structure, limit) {
    let n = 0;
    for (const byte of structure) {
      if (byte === 0x2c || byte === 0x5b || byte === 0x7b) n++;
    }
    check(n <= limit, "limit_exceeded", `${n} values in the structure`);
  }

  function readDigests(delta, cursor) {
    cursor.take(16 * delta.weightFiles.length);
    for (const file of delta.sideFiles) file.digest = cursor.take(32);
    for (const row of delta.rows) row.baseDigest = row.base ? cursor.take(16) : null;
    for (const row of delta.rows) {
      if (row.isCopied) row.targetDigest = row.baseDigest;
      else row.targetDigest = !row.base || delta.hasTargetDigests ? cursor.take(16) : null;
    }
    cursor.take(16 * delta.nChunks + 16 * delta.nTouched);
  }

  // ---- the structure (§3.1)

  const integer = (r) => r.integer();
  const integerOrMinusOne = (r) => r.integerOrMinusOne();
  const string = (r) => r.string();
  const bit = (r) => r.bit();
  const listOf = (read, limit) => (r) => r.list(read, limit);
  const tupleOf = (...readers) => (r) => r.tuple(...readers);
  const objectOf = (readers) => (r) => r.object(readers);
  const orNull = (read) => (r) => (r.has("null") ? null : read(r));

  function weightHeader(r) {
    r.skip("[");
    const kind = r.string();
    let header;
    if (kind === "canonical") {
      r.skip(",");
      header = { metadata: orNull(listOf(tupleOf(string, string)))(r), stored: null };
    } else if (kind === "stored") {
      r.skip(",");
      const raw = r.integer();
      r.skip(",");
      header = { metadata: null, stored: { raw, stored: r.integer() } };
    } else {
      throw new Refused("unsupported_feature", `a header of kind ${JSON.stringify(kind.slice(0, 40))}`);
    }
    r.skip("]");
    return header;
  }

  const STRUCTURE = {
    requires: listOf(string),
    base: objectOf({ id: orNull(string), n_unused: integer, files: listOf(string, MAX_FILES) }),
    target: objectOf({
      kind: string,
      digests: (r) => r.boolean(),
      weight_files: listOf(tupleOf(string, integer, weightHeader), MAX_FILES),
      side_files: listOf(tupleOf(string, integer, integerOrMinusOne), MAX_FILES),
      empty_folders: listOf(string, MAX_FOLDERS),
    }),
    layouts: listOf(tupleOf(string, integer, string, listOf(integer))),
    tensors: objectOf({
      names: listOf(string, MAX_ROWS),
      layouts: listOf(integer, MAX_ROWS),
      base_files: listOf(integerOrMinusOne, MAX_ROWS),
      base_names: listOf(tupleOf(integer, string), MAX_ROWS),
      base_layouts: listOf(tupleOf(integer, integer), MAX_ROWS),
      keep: listOf(tupleOf(integer, integer), MAX_ROWS),
      n_chunks: listOf(integer, MAX_ROWS),
    }),
    codings: listOf(tupleOf(string, string, string, bit)),
    chunks: objectOf({
      starts: listOf(integer, MAX_CHUNKS),
      spans: listOf(integer, MAX_CHUNKS),
      nnz: listOf(integer, MAX_CHUNKS),
      codings: listOf(integer, MAX_CHUNKS),
      touched: listOf(bit, MAX_CHUNKS),
      raw: listOf(integer),
      stored: listOf(integer),
    }),
  };

  /** Return the content of a structure; every rule that needs no digest is checked. */
  function readStructure(text) {
    const reader = new CompactReader(text, "the structure");
    const { requires, base, target, layouts, tensors, codings, chunks } = reader.object(STRUCTURE);
    reader.end();
    check(requires.length === 0, "unsupported_feature", "the delta needs a feature that this page lacks");
    base.files.forEach(checkPath);
    const rows = readRows(tensors, base.files, layouts.map(readLayout));
    const files = readTarget(target, rows);
    codings.forEach(checkCoding);
    const sums = placeChunks(rows, tensors.n_chunks, chunks, codings);
    check(
      target.digests || sums.nTouched === sums.nChunks, "corrupt",
      "there are neither target digests nor touched digests for a chunk",
    );
    const parts = [...files.sideFiles.map((file) => Math.max(file.stored, 0))];
    parts.push(...files.weightFiles.map((file) => file.stored?.stored ?? 0));
    const otherBytes = parts.reduce((sum, n) => sum + BigInt(n), 0n);
    return {
      base: { id: base.id, nUnused: base.n_unused },
      kind: target.kind,
      hasTargetDigests: target.digests,
      ...files,
      rows,
      ...sums,
      payloadBytes: exact(sums.streamBytes + otherBytes),
    };
  }

  function readLayout([dtype, bits, element, shape]) {
    check(/^[if][1248]$/.test(element), "unsupported_feature", "an unknown element type");
    const [knownBits, knownElement] = DTYPES.get(dtype) ?? [bits, element];
    check(bits === knownBits && element === knownElement, "corrupt", "the layout of a known dtype");
    check(nBytes(dtype) <= 64, "limit_exceeded", "a dtype of more than 64 bytes");
    check(bits <= 1024, "limit_exceeded", `${bits} bits per value`);
    check(shape.length <= 64, "limit_exceeded", `${shape.length} dimensions`);
    const isEmpty = shape.includes(0);
    let nBits = isEmpty ? 0n : BigInt(bits);
    for (const size of isEmpty ? [] : shape) {
      nBits *= BigInt(size);
      check(nBits < MAX_BITS, "limit_exceeded", "a tensor of 2^63 bits or more");
    }
    const width = Number(element[1]);
    check(nBits % BigInt(8 * width) === 0n, "corrupt", "a tensor is not a whole number of elements");
    const nElements = exact(nBits / BigInt(8 * width));
    return { dtype, bits, element, shape, width, nBits, nElements };
  }

  // ---- rows and files (§3, §4)

  function pairsByRow(pairs, baseFiles) {
    pairs.forEach(([row], i) => {
      check(i === 0 || pairs[i - 1][0] < row, "corrupt", "pairs do not ascend by row");
      check(row < baseFiles.length && baseFiles[row] >= 0, "corrupt", "a pair names a row without a base");
    });
    return new Map(pairs);
  }

  function readRows(columns, files, layouts) {
    const { names, n_chunks: nChunks, base_files: baseFiles } = columns;
    const own = columns.layouts;
    const isEven = [own, baseFiles, nChunks].every((column) => column.length === names.length);
    check(isEven, "corrupt", "columns of rows differ in length");
    const baseNames = pairsByRow(columns.base_names, baseFiles);
    const baseLayouts = pairsByRow(columns.base_layouts, baseFiles);
    const keep = pairsByRow(columns.keep, baseFiles);
    let nBits = 0n;
    const rows = names.map((name, i) => {
      const baseName = baseNames.get(i) ?? name;
      const baseLayout = baseLayouts.get(i) ?? own[i];
      const isIndex = own[i] < layouts.length && baseLayout < layouts.length && baseFiles[i] < files.length;
      check(isIndex, "corrupt", "the index of a layout or of a base file");
      const repeats = baseNames.get(i) === name || baseLayouts.get(i) === own[i];
      check(!repeats, "corrupt", "a pair repeats the name or layout of its row");
      check(nBytes(name) <= 1024 && nBytes(baseName) <= 1024, "limit_exceeded", "a name of more than 1024 bytes");
      check(name !== "__metadata__", "corrupt", "a tensor named __metadata__");
      const [layout, before] = [layouts[own[i]], layouts[baseLayout]];
      nBits += layout.nBits;
      check(nBits < MAX_BITS, "limit_exceeded", "tensors of 2^63 bits or more");
      const base = baseFiles[i] < 0 ? null : { file: files[baseFiles[i]], name: baseName, layout: before };
      const most = base ? mostKept(layout, before) : 0;
      check(!keep.has(i) || keep.get(i) < most, "corrupt", "a row keeps more elements than it can");
      const kept = keep.get(i) ?? most;
      const isWhole = kept === layout.nElements && kept === before.nElements;
      return { name, file: null, layout, base, isCopied: base !== null && isWhole && nChunks[i] === 0 };
    });
    return rows;
  }

  function isSameKind(a, b) {
    return a.dtype === b.dtype && a.bits === b.bits && a.element === b.element;
  }

  function mostKept(layout, before) {
    if (!isSameKind(layout, before)) return 0;
    return before.nElements < layout.nElements ? before.nElements : layout.nElements;
  }

  function readTarget(target, rows) {
    const known = ["folder", "file"].includes(target.kind);
    check(known, "unsupported_feature", "an unknown kind of target");
    let at = 0;
    const weightFiles = target.weight_files.map(([path, n, header]) => {
      check(n <= rows.length - at, "corrupt", "rows and weight files disagree");
      const mine = rows.slice(at, at + n);
      at += n;
      for (const row of mine) row.file = path;
      const isUnique = new Set(mine.map((row) => row.name)).size === n;
      check(isUnique, "corrupt", "a weight file has two tensors of one name");
      const keys = (header.metadata ?? []).map(([key]) => key);
      check(new Set(keys).size === keys.length, "corrupt", "metadata has a key twice");
      if (header.stored) {
        check(header.stored.raw <= MAX_CARRIED, "limit_exceeded", "a stored header of more than 2^27 bytes");
        checkPart(header.stored.stored, header.stored.raw);
      }
      return { path, nTensors: n, ...header };
    });
    check(at === rows.length, "corrupt", "rows and weight files disagree");
    const sideFiles = target.side_files.map(([path, size, stored]) => {
      if (stored >= 0) {
        check(size <= MAX_CARRIED, "limit_exceeded", "a carried file of more than 2^27 bytes");
        checkPart(stored, size);
      }
      return { path, nBytes: size, stored };
    });
    checkFiles(target, weightFiles, sideFiles);
    return { weightFiles, sideFiles, emptyFolders: target.empty_folders };
  }

  /** Check the sizes of a stored header or a carried file (R8, R10). */
  function checkPart(stored, raw) {
    check(stored <= raw && (stored > 0 || raw === 0), "corrupt", "the stored size of a file or header");
    const isBounded = stored === raw || raw <= 64 * stored + 1024;
    check(isBounded, "limit_exceeded", `${stored} bytes expand to ${raw}`);
  }

  function checkFiles(target, weightFiles, sideFiles) {
    const weights = weightFiles.map((file) => file.path);
    const sides = sideFiles.map((file) => file.path);
    const folders = target.empty_folders;
    const all = [...weights, ...sides, ...folders];
    all.forEach(checkPath);
    checkApart(all);
    checkSorted(sides);
    checkSorted(folders);
    const isWeight = (path) => path.endsWith(".safetensors");
    if (target.kind === "file") {
      const isOne = weights.length === 1 && !weights[0].includes("/") && all.length === 1;
      check(isOne, "corrupt", "a target of kind file is not one file");
    } else {
      check(weights.every(isWeight), "corrupt", "a weight file does not end in .safetensors");
    }
    check(!sides.some(isWeight), "corrupt", "a side file ends in .safetensors");
  }

  // ---- chunks (§5 to §7)

  function checkCoding([values, index, packing, classes]) {
    const known =
      ["target", "ulp"].includes(values) &&
      ["gaps", "bitmap", "rice", "tiles"].includes(index) &&
      ["planes", "steps", "scaled"].includes(packing);
    check(known, "unsupported_feature", "an unknown encoding");
    const isValid = !classes || index === "rice" || packing === "steps";
    check(isValid, "corrupt", "classes without rice or steps");
  }

  /** Return the possible raw sizes of a chunk's streams as `[low, high]`, or the size if it is not stated. */
  function streamSizes([, index, packing], span, nnz, width) {
    const far = Math.floor(span / 4) + 32768;
    const positions = {
      gaps: [nnz, nnz + Math.floor(span / 255)], bitmap: Math.ceil(span / 8), rice: [2, far], tiles: [8, far],
    };
    const values = {
      planes: Array(width).fill(nnz),
      steps: [[4, (width + 1) * nnz + 32768]],
      scaled: [nnz, [0, Math.min(width, 4) * nnz]],
    };
    return [positions[index], ...values[packing]];
  }

  /** Give each row its sums over its chunks; return the sums over all chunks. */
  function placeChunks(rows, nChunks, columns, codings) {
    const total = nChunks.reduce((sum, n) => sum + BigInt(n), 0n);
    check(total <= MAX_CHUNKS, "limit_exceeded", `${total} chunks`);
    for (const name of ["starts", "spans", "nnz", "codings", "touched"]) {
      check(columns[name].length === Number(total), "corrupt", "columns of chunks differ in length");
    }
    let [chunk, raw, stored] = [0, 0, 0];

    function stream(size, isPlane) {
      const n = Array.isArray(size) ? columns.raw[raw++] : size;
      const own = columns.stored[stored++];
      const isPossible = !Array.isArray(size) || (n >= size[0] && n <= size[1]);
      check(isPossible && own !== undefined, "corrupt", "a stream's size is missing or not possible");
      const mayBeEmpty = isPlane || n === 0;
      check(own <= n && (own > 0 || mayBeEmpty), "corrupt", "the stored size of a stream");
      return own;
    }

    function place(row, end) {
      const [start, span, nnz] = [columns.starts[chunk], columns.spans[chunk], columns.nnz[chunk]];
      const coding = codings[columns.codings[chunk]];
      check(coding, "corrupt", "the index of a coding");
      check(1 <= nnz && nnz <= span && span <= 2 ** 24, "corrupt", "the span or nnz of a chunk");
      const next = BigInt(start) + BigInt(span);
      check(BigInt(start) >= end && next <= BigInt(row.layout.nElements), "corrupt", "the place of a chunk");
      const [positions, ...values] = streamSizes(coding, span, nnz, row.layout.width);
      row.indexBytes += stream(positions, false);
      for (const size of values) row.valueBytes += stream(size, coding[2] === "planes");
      row.nnz += nnz;
      row.indexEncodings[coding[1]] = (row.indexEncodings[coding[1]] ?? 0) + 1;
      row.valueEncodings[coding[0]] = (row.valueEncodings[coding[0]] ?? 0) + 1;
      chunk++;
      return next;
    }

    let streamBytes = 0n;
    rows.forEach((row, i) => {
      Object.assign(row, { nnz: 0, indexBytes: 0, valueBytes: 0, indexEncodings: {}, valueEncodings: {} });
      row.nChunks = nChunks[i];
      let end = 0n;
      for (let left = nChunks[i]; left > 0; left--) end = place(row, end);
      streamBytes += BigInt(row.indexBytes + row.valueBytes);
    });
    const isAll = raw === columns.raw.length && stored === columns.stored.length;
    check(isAll, "corrupt", "there are more sizes than streams");
    const nTouched = columns.touched.reduce((sum, one) => sum + one, 0);
    return { nChunks: Number(total), nTouched, streamBytes };
  }

  Object.assign(sparsedelta, { isSameKind, readDelta });
})();
