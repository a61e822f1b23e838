// What a delta changes and how large its parts are: the same JSON as `sparsedelta inspect --json`.
"use strict";

(() => {
  const { blake3, exact, hex, isSameKind, readDelta } = sparsedelta;
  const STATES = ["changed", "added", "resized", "reshaped", "renamed", "unchanged"];
  const encoder = new TextEncoder();

  function ratio(part, whole) {
    return whole ? Number(part) / Number(whole) : null;
  }

  function isSameShape(a, b) {
    return a.length === b.length && a.every((size, i) => size === b[i]);
  }

  function stateOf({ base, layout, isCopied, nChunks, name }) {
    if (!base || !isSameKind(base.layout, layout)) return "added";
    if (!isSameShape(base.layout.shape, layout.shape)) {
      const hasRows = base.layout.shape.length === layout.shape.length;
      return hasRows && isSameShape(base.layout.shape.slice(1), layout.shape.slice(1)) ? "resized" : "reshaped";
    }
    if (nChunks || !isCopied) return "changed";
    return base.name === name ? "unchanged" : "renamed";
  }

  function tensorJSON(row) {
    const { base, layout, nnz, indexBytes, valueBytes } = row;
    return {
      name: row.name,
      file: row.file,
      state: stateOf(row),
      dtype: layout.dtype,
      shape: layout.shape,
      base_name: base ? base.name : null,
      base_file: base ? base.file : null,
      base_shape: base ? base.layout.shape : null,
      nnz,
      numel: layout.nElements,
      index_bytes: indexBytes,
      value_bytes: valueBytes,
      index_encodings: row.indexEncodings,
      value_encodings: row.valueEncodings,
      density: ratio(nnz, layout.nElements) ?? 0,
      payload_bytes: indexBytes + valueBytes,
    };
  }

  // ---- fingerprints (§14)

  function littleEndian(value, n) {
    const out = new Uint8Array(n);
    for (let rest = BigInt(value), i = 0; i < n; i++, rest >>= 8n) out[i] = Number(rest & 255n);
    return out;
  }

  function joined(parts) {
    const out = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) {
      out.set(part, at);
      at += part.length;
    }
    return out;
  }

  function compareBytes(a, b) {
    const n = Math.min(a.length, b.length);
    for (let i = 0; i < n; i++) if (a[i] !== b[i]) return a[i] - b[i];
    return a.length - b.length;
  }

  function record(name, { dtype, shape }, digest) {
    const [coded, kind] = [encoder.encode(name), encoder.encode(dtype)];
    const sizes = shape.map((size) => littleEndian(size, 8));
    return joined([
      littleEndian(coded.length, 4), coded, littleEndian(kind.length, 1), kind,
      littleEndian(shape.length, 4), ...sizes, digest,
    ]);
  }

  function fingerprint(records) {
    const domain = encoder.encode("sparsedelta fingerprint 2\0");
    return hex(blake3(joined([domain, ...records.sort(compareBytes)])));
  }

  function baseFingerprint(rows) {
    const records = new Map(); // by base tensor: several rows may have the same one
    for (const { base, baseDigest } of rows) {
      if (base) records.set(`${base.file}\0${base.name}`, record(base.name, base.layout, baseDigest));
    }
    return fingerprint([...records.values()]);
  }

  function targetFingerprint(rows) {
    if (rows.some((row) => row.targetDigest === null)) return null;
    return fingerprint(rows.map((row) => record(row.name, row.layout, row.targetDigest)));
  }

  // ---- sums

  function sumOf(items, read) {
    return exact(items.reduce((sum, item) => sum + BigInt(read(item)), 0n));
  }

  /** Return the sum of counts by name, the largest first. */
  function summed(counts) {
    const total = new Map();
    for (const count of counts) {
      for (const [name, n] of Object.entries(count)) total.set(name, (total.get(name) ?? 0) + n);
    }
    return Object.fromEntries([...total].sort((a, b) => b[1] - a[1]));
  }

  function sizesOf(delta, indexBytes, valueBytes) {
    return {
      file_bytes: delta.fileBytes,
      header_bytes: delta.headerBytes,
      manifest_bytes: delta.manifestBytes,
      index_bytes: indexBytes,
      value_bytes: valueBytes,
      side_file_bytes: sumOf(delta.sideFiles, (file) => Math.max(file.stored, 0)),
      stored_header_bytes: sumOf(delta.weightFiles, (file) => file.stored?.stored ?? 0),
      payload_bytes: exact(BigInt(indexBytes) + BigInt(valueBytes)),
    };
  }

  /** Return the inspection of a delta that `readDelta` returned. */
  function inspection(delta) {
    const { rows } = delta;
    const tensors = rows.map(tensorJSON);
    const nnz = sumOf(rows, (row) => row.nnz);
    const numel = sumOf(rows, (row) => row.layout.nElements);
    const tensorBytes = exact(rows.reduce((sum, row) => sum + row.layout.nBits, 0n) / 8n);
    const states = Object.fromEntries(STATES.map((state) => [state, 0]));
    for (const tensor of tensors) states[tensor.state]++;
    const sizes = sizesOf(
      delta, sumOf(rows, (row) => row.indexBytes), sumOf(rows, (row) => row.valueBytes),
    );
    const info = delta.notes.get("info");
    return {
      base: { id: delta.base.id, fingerprint: baseFingerprint(rows), n_unused: delta.base.nUnused },
      target: {
        kind: delta.kind,
        fingerprint: targetFingerprint(rows),
        tensor_bytes: tensorBytes,
        weight_files: delta.weightFiles.map((file) => (
          { path: file.path, n_tensors: file.nTensors, stored_header: file.stored !== null }
        )),
        side_files: delta.sideFiles.map((file) => (
          { path: file.path, n_bytes: file.nBytes, carried: file.stored >= 0 }
        )),
        empty_folders: delta.emptyFolders,
      },
      n_tensors: tensors.length,
      states,
      nnz,
      numel,
      density: ratio(nnz, numel) ?? 0,
      share: ratio(sizes.file_bytes, tensorBytes),
      sizes,
      payload_bytes_per_change: ratio(sizes.payload_bytes, nnz),
      file_bytes_per_change: ratio(sizes.file_bytes, nnz),
      index_encodings: summed(tensors.map((tensor) => tensor.index_encodings)),
      value_encodings: summed(tensors.map((tensor) => tensor.value_encodings)),
      info: info instanceof Map ? info : new Map(),
      tensors,
    };
  }

  /** Return a promise of the inspection of a source (see `readDelta`). */
  async function inspect(source) {
    return inspection(await readDelta(source));
  }

  Object.assign(sparsedelta, { STATES, inspect });
})();
